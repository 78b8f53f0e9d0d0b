"""Mixed granularity on a token grid: pool regions into cells, un-pool cells into tokens.

The grid is divided into regions, and each region into square cells of one side, its granularity.
The mean of a cell is a query; the update of the query goes to every token of the cell. The mapping
between cells and queries is computed once, in a :class:`RegionPlan`, and used in both directions.

Regions and cells at the bottom and right borders may extend beyond the grid. They hold the tokens
that exist; cells without a token are left out.

Source: DGE, arXiv 2301.03831, section 3.2. The released code takes whole regions only.
"""

from collections.abc import Iterator
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...runtime.reference import is_compiling
from ...runtime.torch_private import is_without_values
from .cache import cache_by_shape
from .rotary import Rotation
from .utils import ceil_div


class RegionLayout(NamedTuple):
    """The regions of a grid and all cells they can have. It depends on shapes only.

    Cells are numbered granularity by granularity, finest first, each row by row. Prefix tokens,
    such as a class token, come first, each as a cell of its own. There are L cells of all
    granularities, R regions, K granularities and N tokens, prefix tokens included.

    Attributes:
        grid: ``(H, W)``, in tokens.
        granularities: Sides of the cells, finest first, in tokens; the finest is 1.
        region_size: Side of a region, in tokens.
        num_prefix_tokens: Tokens before those of the grid, such as a class token.
        shape: ``(Hr, Wr)``, in regions.
        region: Region of each cell on the grid, ``(L - num_prefix_tokens,)``.
        level: Index of the granularity of each cell on the grid, likewise.
        center: Mean position of its tokens, column and row, ``(L - num_prefix_tokens, 2)``.
        cell_of_token: Cell of each token under each granularity, ``(K, N)``.
        token_region: Region of each token of the grid, ``(H * W,)``.
        num_cells: Cells of each region under each granularity, ``(R, K)``.
        rotation: Of queries and keys of all L cells, where positions are rotary.
    """

    grid: tuple[int, int]
    granularities: tuple[int, ...]
    region_size: int
    num_prefix_tokens: int
    shape: tuple[int, int]
    region: Tensor
    level: Tensor
    center: Tensor
    cell_of_token: Tensor
    token_region: Tensor
    num_cells: Tensor
    rotation: Rotation | None = None

    @property
    def num_cells_total(self) -> int:
        """L, the cells of all granularities and the prefix tokens."""
        return self.num_prefix_tokens + len(self.level)

    @property
    def sizes(self) -> list[int]:
        """Prefix tokens, then cells of each granularity: the parts of L."""
        return [self.num_prefix_tokens, *(rows * columns for rows, columns in self.level_grids)]

    @property
    def level_grids(self) -> list[tuple[int, int]]:
        """Rows and columns of the cells of each granularity."""
        height, width = self.grid
        return [(ceil_div(height, side), ceil_div(width, side)) for side in self.granularities]


@cache_by_shape
def make_region_layout(
    grid: tuple[int, int],
    granularities: tuple[int, ...],
    region_size: int,
    num_prefix_tokens: int = 0,
    device: torch.device | str = 'cpu',
) -> RegionLayout:
    """Divide a grid into regions; for arguments and result see :class:`RegionLayout`."""
    height, width = grid
    shape = ceil_div(height, region_size), ceil_div(width, region_size)
    row, column = torch.arange(height)[:, None], torch.arange(width)
    region, level, center, cell = [], [], [], []
    start = num_prefix_tokens
    for k, side in enumerate(granularities):
        rows, columns = ceil_div(height, side), ceil_div(width, side)
        down, across = (torch.arange(n) * side // region_size for n in (rows, columns))
        region.append((down[:, None] * shape[1] + across).flatten())
        level.append(torch.full((rows * columns,), k))
        centers = [_centers(columns, side, width), _centers(rows, side, height)]
        center.append(torch.stack(torch.meshgrid(*centers, indexing='xy'), dim=-1).flatten(0, 1))
        cell.append((row // side * columns + column // side).flatten() + start)
        start += rows * columns
    prefix = torch.arange(num_prefix_tokens).repeat(len(cell), 1)
    cell_of_token = torch.cat([prefix, torch.stack(cell)], dim=1)
    region, level, center = torch.cat(region), torch.cat(level), torch.cat(center)
    num_regions = shape[0] * shape[1]
    num_cells = torch.bincount(
        region * len(granularities) + level, minlength=num_regions * len(granularities)
    ).view(num_regions, -1)
    token_region = region[: height * width]
    tensors = [
        t.to(device) for t in (region, level, center, cell_of_token, token_region, num_cells)
    ]
    return RegionLayout(grid, granularities, region_size, num_prefix_tokens, shape, *tensors)


def _centers(cells: int, side: int, tokens: int) -> Tensor:
    """Mean position of the tokens of each cell along one axis."""
    first = torch.arange(cells) * side
    return (first + (first + side - 1).clamp(max=tokens - 1)).to(torch.float32) / 2


class CellSet(NamedTuple):
    """Some of the cells of each image of a batch, such as those that are queries.

    Attributes:
        layout: The regions and all their cells.
        cells: ``(M,)``, rising indices into the ``B * L`` cells of the batch.
        counts: Cells of each image, adding up to M. Of whole images they are listed separately for
            prefix tokens and each granularity.
    """

    layout: RegionLayout
    cells: Tensor
    counts: list[list[int]]

    @property
    def lengths(self) -> list[int]:
        """Cells of each image."""
        return [sum(counts) for counts in self.counts]

    @property
    def image(self) -> Tensor:
        """Index of the image of each cell, ``(M,)``."""
        return self.cells // self.layout.num_cells_total

    @property
    def center(self) -> Tensor:
        """Mean position of each cell, column and row, ``(M, 2)``; for cells on the grid."""
        place = self.cells % self.layout.num_cells_total - self.layout.num_prefix_tokens
        return self.layout.center.index_select(0, place)

    def levels(self) -> Iterator[tuple[int, int, slice, Tensor]]:
        """Parts of one image and granularity, in order; of whole images.

        Yields:
            The image; 0 for prefix tokens, k + 1 for the k-th granularity; the part; and the places
            of its cells among all cells of that granularity, row by row, ``(n,)``.
        """
        begins, start = [0, *accumulate(self.layout.sizes)], 0
        for image, counts in enumerate(self.counts):
            for k, count in enumerate(counts):
                part = slice(start, start + count)
                first = image * self.layout.num_cells_total + begins[k]
                yield image, k, part, self.cells[part] - first
                start += count

    @property
    def complement(self) -> 'CellSet':
        """All other cells of the batch."""
        free = torch.ones(
            len(self.counts) * self.layout.num_cells_total,
            dtype=torch.bool,
            device=self.cells.device,
        )
        free[self.cells] = False
        sizes = self.layout.sizes
        counts = [[s - c for s, c in zip(sizes, chosen, strict=True)] for chosen in self.counts]
        cells = _indices(free, free.cumsum(0) - 1, len(free) - len(self.cells))
        return self._replace(cells=cells, counts=counts)


def all_cells(layout: RegionLayout, batch: int) -> CellSet:
    """Every cell of ``batch`` images."""
    cells = torch.arange(batch * layout.num_cells_total, device=layout.level.device)
    return CellSet(layout, cells, [layout.sizes] * batch)


def gate_per_cell(gates: Tensor, layout: RegionLayout) -> Tensor:
    """Gate of each cell: ``(B, Hr, Wr, K) -> (B, L, 1)``; 1 for prefix tokens."""
    index = layout.region * len(layout.granularities) + layout.level
    on_grid = gates.flatten(1).index_select(1, index)
    prefix = on_grid.new_ones(len(gates), layout.num_prefix_tokens)
    return torch.cat([prefix, on_grid], dim=1).unsqueeze(-1)


class RegionPlan(NamedTuple):
    """The cells of a batch that are queries, given the granularity of every region.

    Attributes:
        queries: The chosen cells, one query each.
        owner: Query of each token, ``(B * N,)``.
    """

    queries: CellSet
    owner: Tensor


def check_concrete(choice: Tensor, batch: int) -> None:
    """Refuse choices that have no values yet; in ``torch.export`` one image needs none.

    Args:
        choice: A choice, or what it is made from.
        batch: Images.

    Raises:
        RuntimeError: The tensor is on the meta device, fake, or transformed by torch.func.
    """
    if is_compiling() and batch == 1:
        return
    if is_without_values(choice):
        raise RuntimeError(
            'this network chooses its tokens by looking at the image, which has no '
            'values here: it can neither be exported for more than one image at a time, nor run '
            'on fake tensors, on the meta device or under torch.func. Give it images, or take the '
            'dense twin, mmtoken.dense_twin(config), which chooses nothing'
        )


# Not traced: the number of queries depends on values.
@torch.compiler.disable
def plan_regions(choice: Tensor, layout: RegionLayout) -> RegionPlan:
    """Find the queries of a batch. Synchronizes with the device once, for their number.

    Args:
        choice: Index of each region's granularity, ``(B, Hr, Wr)``.
        layout: From :func:`make_region_layout`.

    Raises:
        RuntimeError: See :func:`check_concrete`.
    """
    batch, choice = len(choice), choice.flatten(1)
    check_concrete(choice, batch)
    prefix = torch.ones(batch, layout.num_prefix_tokens, dtype=torch.bool, device=choice.device)
    chosen = torch.cat([prefix, choice[:, layout.region] == layout.level], dim=1)
    counts = torch.stack([part.sum(dim=1) for part in chosen.split(layout.sizes, dim=1)], dim=1)
    rank = chosen.flatten().cumsum(0) - 1
    queries = CellSet(layout, *find_chosen(chosen.flatten(), rank, counts))
    prefix, cell = layout.cell_of_token.tensor_split([layout.num_prefix_tokens], dim=1)
    token = torch.arange(cell.shape[1], device=choice.device)
    cell = cell.flatten()[choice[:, layout.token_region] * len(token) + token]
    owned = torch.cat([prefix[:1].expand(batch, -1), cell], dim=1)
    return RegionPlan(queries, rank.view(batch, -1).gather(1, owned).flatten())


def find_chosen(mask: Tensor, rank: Tensor, counts: Tensor) -> tuple[Tensor, list[list[int]]]:
    """Places where a flat mask is True, and their numbers. Synchronizes with the device once.

    Args:
        mask: Of a batch, ``(N,)``, bool.
        rank: ``mask.cumsum(0) - 1``.
        counts: How often it is True in the parts of each image, ``(B, parts)``.

    Returns:
        Rising places, ``(M,)``, and ``counts``. In ``torch.export``, of one image, M is a symbol,
        and the only count.
    """
    if is_compiling():
        (places,) = mask.nonzero(as_tuple=True)
        torch._check(places.shape[0] > 0)
        torch._check(places.shape[0] <= mask.shape[0])
        return places, [[places.shape[0]]]
    counts = counts.tolist()
    return _indices(mask, rank, sum(map(sum, counts))), counts


def _indices(mask: Tensor, rank: Tensor, total: int) -> Tensor:
    """Places where a flat mask is True, given their ranks and their number.

    ``nonzero()`` would synchronize with the device again to find their number.
    """
    places = torch.arange(len(mask), device=mask.device)
    found = places.new_empty(total + 1)  # the last one collects the places that are False
    return found.scatter_(0, rank.masked_fill(~mask, total), places)[:total]


def pool_regions(x: Tensor, plan: RegionPlan) -> Tensor:
    """Mean-pool every cell of a granularity plan into one query.

    Args:
        x: Tokens, prefix tokens first, ``(B, N, C)``.
        plan: From :func:`plan_regions`.

    Returns:
        Packed queries, ``(M, C)``, image after image.

    Inverse: :func:`unpool_regions`.
    """
    pooled = pool_every_granularity(x, plan.queries.layout)
    return pooled.flatten(0, 1).index_select(0, plan.queries.cells)


def unpool_regions(updates: Tensor, plan: RegionPlan) -> Tensor:
    """Give every token the update of its query: ``(M, C) -> (B, N, C)``.

    Inverse: :func:`pool_regions`.
    """
    return updates.index_select(0, plan.owner).unflatten(0, (len(plan.queries.counts), -1))


def pool_parts(x: Tensor, layout: RegionLayout) -> list[Tensor]:
    """Prefix tokens, then the cells of each granularity: ``(B, N, C)`` to several ``(B, n, C)``."""
    prefix, tokens = x.tensor_split([layout.num_prefix_tokens], dim=1)
    tokens = tokens.unflatten(1, layout.grid)  # B, H, W, C
    return [prefix, *(pool_cells(tokens, side).flatten(1, 2) for side in layout.granularities)]


def pool_every_granularity(x: Tensor, layout: RegionLayout) -> Tensor:
    """Mean-pool all cells of all granularities: ``(B, N, C) -> (B, L, C)``.

    Inverse: :func:`unpool_every_granularity`.
    """
    return torch.cat(pool_parts(x, layout), dim=1)


def turn_cells(layout: RegionLayout, rotation: Rotation | None) -> RegionLayout:
    """Add the rotation of all cells, given that of the tokens, prefix first.

    That of a cell is the mean of those of its tokens.
    """
    if rotation is None:
        return layout
    means = pool_every_granularity(rotation.cos_sin[None], layout)[0]
    # Not _replace(), whose fields torch.compile loses
    return RegionLayout(*layout[:-1], rotation.like(means))


def unpool_every_granularity(updates: Tensor, layout: RegionLayout) -> Tensor:
    """Sum the updates of a token's cells of all granularities: ``(B, L, C) -> (B, N, C)``.

    Inverse: :func:`pool_every_granularity`, if all but one granularity of a region are zero.
    """
    prefix, *levels = updates.split(layout.sizes, dim=1)
    sides = zip(levels, layout.level_grids, layout.granularities, strict=True)
    tokens = sum(unpool_cells(u.unflatten(1, g), side, layout.grid) for u, g, side in sides)
    return torch.cat([prefix, tokens.flatten(1, 2)], dim=1)


def pool_cells(x: Tensor, side: int) -> Tensor:
    """Mean of each cell: ``(B, H, W, C) -> (B, ceil(H / side), ceil(W / side), C)``."""
    if side == 1:
        return x
    x = F.avg_pool2d(x.permute(0, 3, 1, 2), side, ceil_mode=True, count_include_pad=False)
    return x.permute(0, 2, 3, 1)


def describe_regions(x: Tensor, region_size: int) -> Tensor:
    """Mean and standard deviation of the tokens of regions: ``(B, H, W, C) -> (B, Hr, Wr, 2C)``."""
    mean = pool_cells(x, region_size)
    variance = pool_cells(x.square(), region_size) - mean.square()
    return torch.cat([mean, variance.clamp(min=0).add(1e-6).sqrt()], dim=-1)


def unpool_cells(x: Tensor, side: int, grid: tuple[int, int]) -> Tensor:
    """Give each token the value of its cell: the shapes of :func:`pool_cells`, reversed."""
    if side == 1:
        return x
    x = F.interpolate(x.permute(0, 3, 1, 2), scale_factor=side, mode='nearest')
    return x.permute(0, 2, 3, 1)[:, : grid[0], : grid[1]]
