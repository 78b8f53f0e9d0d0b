"""Mixed granularity on a token grid: regions are pooled into cells, cells un-pooled into tokens.

The grid is tiled into regions, and each region is cut into cells of one of several sides, its
granularity. A cell's mean is a query; what becomes of the query goes to every token of the cell.
Which cell is which query is worked out once, in a :class:`RegionPlan`, and used both ways.

At the bottom and right borders regions and cells may stick out: they hold the tokens that exist,
and cells without a token do not exist.

Source: DGE, arXiv 2301.03831, section 3.2. The released code takes whole regions only.
"""

from collections.abc import Iterator
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .cache import cache_by_shape
from .old_tiles import tokens_per_tile, use_tiling


class RegionLayout(NamedTuple):
    """A grid's regions and all cells they can have: what depends on shapes alone.

    The cells of all granularities stand one after the other, finest first, row by row, after the
    extra tokens, each of which is a cell of its own. Their number is L, that of all regions R, of
    granularities K, of tokens with the extra ones N.

    Attributes:
        grid: ``(H, W)``, in tokens.
        granularities: Sides of the cells, finest first, in tokens; the finest is 1.
        region_size: Side of a region, in tokens.
        num_extra: Tokens before those of the grid, such as a class token.
        shape: ``(Hr, Wr)``, in regions.
        region: The region of each cell, ``(L - num_extra,)``.
        level: The index of its granularity, likewise.
        center: The middle of its tokens, column and row, ``(L - num_extra, 2)``, in tokens.
        cell: The cell of each token under each granularity, ``(K, N)``.
        token_region: The region of each token of the grid, ``(H * W,)``.
        num_cells: Cells of each region under each granularity, ``(R, K)``.
    """

    grid: tuple[int, int]
    granularities: tuple[int, ...]
    region_size: int
    num_prefix_tokens: int
    shape: tuple[int, int]
    region: Tensor
    level: Tensor
    center: Tensor
    cell: Tensor
    token_region: Tensor
    num_cells: Tensor

    @property
    def num_cells_total(self) -> int:
        """L, the cells of all granularities."""
        return self.num_prefix_tokens + len(self.level)

    @property
    def sizes(self) -> list[int]:
        """Extra tokens, then cells of each granularity: the parts of L."""
        return [self.num_prefix_tokens, *(rows * columns for rows, columns in self.level_grids)]

    @property
    def level_grids(self) -> list[tuple[int, int]]:
        """Rows and columns of the cells of each granularity."""
        height, width = self.grid
        return [(-(-height // side), -(-width // side)) for side in self.granularities]


@cache_by_shape
def make_region_layout(
    grid: tuple[int, int],
    granularities: tuple[int, ...],
    region_size: int,
    num_prefix_tokens: int = 0,
    device: torch.device | str = 'cpu',
) -> RegionLayout:
    """Lay regions over a grid; for arguments and result see :class:`RegionLayout`."""
    height, width = grid
    shape = -(-height // region_size), -(-width // region_size)
    row, column = torch.arange(height)[:, None], torch.arange(width)
    region, level, center, cell = [], [], [], []
    start = num_prefix_tokens
    for k, side in enumerate(granularities):
        rows, columns = -(-height // side), -(-width // side)
        down, across = (torch.arange(n) * side // region_size for n in (rows, columns))
        region.append((down[:, None] * shape[1] + across).flatten())
        level.append(torch.full((rows * columns,), k))
        middle = [_middles(columns, side, width), _middles(rows, side, height)]
        center.append(torch.stack(torch.meshgrid(*middle, indexing='xy'), dim=-1).flatten(0, 1))
        cell.append((row // side * columns + column // side).flatten() + start)
        start += rows * columns
    cell = torch.cat(
        [torch.arange(num_prefix_tokens).repeat(len(cell), 1), torch.stack(cell)], dim=1
    )
    region, level, center = torch.cat(region), torch.cat(level), torch.cat(center)
    num_regions = shape[0] * shape[1]
    num_cells = torch.bincount(
        region * len(granularities) + level, minlength=num_regions * len(granularities)
    ).view(num_regions, -1)
    token_region = region[: height * width]
    tensors = (t.to(device) for t in (region, level, center, cell, token_region, num_cells))
    return RegionLayout(grid, granularities, region_size, num_prefix_tokens, shape, *tensors)


def _middles(cells: int, side: int, tokens: int) -> Tensor:
    """Middle of the tokens of each cell along one axis."""
    first = torch.arange(cells) * side
    return (first + (first + side - 1).clamp(max=tokens - 1)).to(torch.float32) / 2


class CellSet(NamedTuple):
    """Some cells of each image of a batch: those that are queries.

    Attributes:
        regions: The regions and all their cells.
        cells: ``(M,)``, as indices into the ``B * L`` of the batch, image after image, rising.
        counts: Cells of each image, adding up to M; of whole images, extra ones and those of each
            granularity apart.
    """

    regions: RegionLayout
    cells: Tensor
    counts: list[list[int]]

    @property
    def lengths(self) -> list[int]:
        """Cells of each image."""
        return [sum(counts) for counts in self.counts]

    @property
    def image(self) -> Tensor:
        """The image of each, ``(M,)``."""
        return self.cells // self.regions.num_cells_total

    @property
    def center(self) -> Tensor:
        """The middle of the tokens of each, column and row, ``(M, 2)``; of cells on the grid."""
        place = self.cells % self.regions.num_cells_total - self.regions.num_prefix_tokens
        return self.regions.center.index_select(0, place)

    def levels(self) -> Iterator[tuple[int, int, slice, Tensor]]:
        """Parts of one image and granularity, in order; of whole images.

        Yields:
            The image; 0 for extra tokens, k + 1 for the k-th granularity; the part; and where its
            cells stand among all those that the granularity has, row by row, ``(n,)``.
        """
        begins, start = [0, *accumulate(self.regions.sizes)], 0
        for image, counts in enumerate(self.counts):
            for k, count in enumerate(counts):
                part = slice(start, start + count)
                yield (
                    image,
                    k,
                    part,
                    self.cells[part] - (image * self.regions.num_cells_total + begins[k]),
                )
                start += count

    @property
    def others(self) -> 'CellSet':
        """All other cells of the batch."""
        free = torch.ones(
            len(self.counts) * self.regions.num_cells_total,
            dtype=torch.bool,
            device=self.cells.device,
        )
        free[self.cells] = False
        sizes = self.regions.sizes
        counts = [[s - c for s, c in zip(sizes, chosen, strict=True)] for chosen in self.counts]
        cells = _indices(free, free.cumsum(0) - 1, len(free) - len(self.cells))
        return self._replace(cells=cells, counts=counts)

    def tiles(self, length: int) -> Iterator[tuple[int, slice, 'CellSet']]:
        """Parts of at most ``length`` cells of one image: the image, the part, and its cells."""
        start = 0
        for image, num_cells in enumerate(self.lengths):
            end = start + num_cells
            for first in range(start, end, length):
                part = slice(first, min(first + length, end))
                yield (
                    image,
                    part,
                    self._replace(cells=self.cells[part], counts=[[part.stop - first]]),
                )
            start = end


def all_cells(regions: RegionLayout, batch: int) -> CellSet:
    """Every cell of ``batch`` images."""
    cells = torch.arange(batch * regions.num_cells_total, device=regions.level.device)
    return CellSet(regions, cells, [regions.sizes] * batch)


def gate_per_cell(gates: Tensor, regions: RegionLayout) -> Tensor:
    """Whether each cell is chosen: ``(B, Hr, Wr, K) -> (B, L, 1)``. Extra tokens always are."""
    index = regions.region * len(regions.granularities) + regions.level
    on_grid = gates.flatten(1).index_select(1, index)
    extra = on_grid.new_ones(len(gates), regions.num_prefix_tokens)
    return torch.cat([extra, on_grid], dim=1).unsqueeze(-1)


class RegionPlan(NamedTuple):
    """Which cells of a batch are queries, after every region has chosen its granularity.

    Attributes:
        queries: The chosen cells, one query each.
        owner: The query that stands for each token, ``(B * N,)``.
    """

    queries: CellSet
    owner: Tensor


def check_concrete(choice: Tensor) -> None:
    """Refuse choices that have no values yet.

    Raises:
        RuntimeError: The tensor is on the meta device, fake, or transformed by torch.func.
    """
    transformed = torch._C._functorch.is_functorch_wrapped_tensor(choice)
    if choice.is_meta or isinstance(choice, FakeTensor) or transformed:
        raise RuntimeError(
            'this network chooses its tokens by looking at the image (DGE, MSViT), which has no '
            'values here: it can neither be exported (torch.export, the ONNX exporter on top of '
            'it), nor run on fake tensors, on the meta device or under torch.func. Give it '
            'images, or take the dense twin, mmtoken.dense_twin(config), which chooses nothing'
        )


# Not to be traced: how many queries there are depends on values.
@torch.compiler.disable
def plan_regions(choice: Tensor, regions: RegionLayout) -> RegionPlan:
    """Find the queries of a batch. Waits for the device once, to learn how many there are.

    Args:
        choice: Index of each region's granularity, ``(B, Hr, Wr)``.
        regions: From :func:`make_region_layout`.

    Raises:
        RuntimeError: See :func:`check_concrete`.
    """
    check_concrete(choice)
    batch, choice = len(choice), choice.flatten(1)
    extra = torch.ones(batch, regions.num_prefix_tokens, dtype=torch.bool, device=choice.device)
    chosen = torch.cat([extra, choice[:, regions.region] == regions.level], dim=1)
    counts = torch.stack([part.sum(dim=1) for part in chosen.split(regions.sizes, dim=1)], dim=1)
    counts = counts.tolist()
    rank = chosen.flatten().cumsum(0) - 1
    queries = CellSet(regions, _indices(chosen.flatten(), rank, sum(map(sum, counts))), counts)
    extra, cell = regions.cell.split([regions.num_prefix_tokens, len(regions.token_region)], dim=1)
    token = torch.arange(cell.shape[1], device=choice.device)
    cell = cell.flatten()[choice[:, regions.token_region] * len(token) + token]
    owned = torch.cat([extra[:1].expand(batch, -1), cell], dim=1)
    return RegionPlan(queries, rank.view(batch, -1).gather(1, owned).flatten())


def _indices(mask: Tensor, rank: Tensor, total: int) -> Tensor:
    """Where a flat mask is True, given how often before each place and in total.

    ``nonzero()`` would wait for the device once more to learn the latter.
    """
    places = torch.arange(len(mask), device=mask.device)
    found = places.new_empty(total + 1)  # the last is for all that is not found
    return found.scatter_(0, rank.masked_fill(~mask, total), places)[:total]


def pool_regions(x: Tensor, plan: RegionPlan) -> Tensor:
    """Mean-pool every cell of a granularity plan into one query.

    Args:
        x: Tokens, extra ones first, ``(B, N, C)``.
        plan: From :func:`plan_regions`.

    Returns:
        Packed queries, ``(M, C)``, image after image.

    Inverse: :func:`unpool_regions`.
    """
    regions, cells = plan.queries.regions, plan.queries.cells
    if not use_tiling(x, training=False):
        return pool_every_granularity(x, regions).flatten(0, 1).index_select(0, cells)
    # Granularity by granularity: to put all cells in a row first would copy the map.
    parts = pool_parts(x, regions)
    queries = x.new_empty(len(cells), x.shape[-1])
    for image, k, part, places in plan.queries.levels():
        torch.index_select(parts[k][image], 0, places, out=queries[part])
    return queries


def select_granularity(x: Tensor, level: int, cells: CellSet) -> Tensor:
    """Of all cells of a granularity take those that a set has, packed.

    Args:
        x: All cells of each image, row by row, ``(B, n, C)``.
        level: 0 for extra tokens, k + 1 for the k-th granularity.
        cells: The set, of whole images.

    Returns:
        ``(m, C)``.
    """
    return torch.cat([
        x[image].index_select(0, places) for image, k, _, places in cells.levels() if k == level
    ])  # fmt: skip


def concat_granularities(levels: list[Tensor], cells: CellSet) -> Tensor:
    """Put cells of all levels, each from :func:`select_granularity`, into one row: ``(M, C)``."""
    counts = zip(*cells.counts, strict=True)
    parts = [x.split(list(n)) for x, n in zip(levels, counts, strict=True)]
    return torch.cat([part for image in zip(*parts, strict=True) for part in image])


def unpool_regions(updates: Tensor, plan: RegionPlan) -> Tensor:
    """Give every token what became of its query: ``(M, C) -> (B, N, C)``."""
    return updates.index_select(0, plan.owner).unflatten(0, (len(plan.queries.counts), -1))


def add_unpooled(x: Tensor, updates: Tensor, plan: RegionPlan) -> Tensor:
    """``x + unpool_regions(updates, plan)``, in inference tile by tile."""
    if not use_tiling(x, training=False):
        return x + unpool_regions(updates, plan)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    step = tokens_per_tile(x.shape[-1])
    parts = (t.split(step) for t in (x.flatten(0, 1), plan.owner, out.flatten(0, 1)))
    for tokens, owner, result in zip(*parts, strict=True):
        torch.add(tokens, updates.index_select(0, owner), out=result)
    return out


def pool_parts(x: Tensor, regions: RegionLayout) -> list[Tensor]:
    """Extra tokens, and the cells of each granularity: ``(B, N, C)`` to some ``(B, n, C)``."""
    extra, tokens = x.split([regions.num_prefix_tokens, len(regions.token_region)], dim=1)
    tokens = tokens.unflatten(1, regions.grid)
    return [extra, *(pool_cells(tokens, side).flatten(1, 2) for side in regions.granularities)]


def pool_every_granularity(x: Tensor, regions: RegionLayout) -> Tensor:
    """Mean-pool all cells of all granularities: ``(B, N, C) -> (B, L, C)``.

    Inverse: :func:`unpool_every_granularity`.
    """
    return torch.cat(pool_parts(x, regions), dim=1)


def unpool_every_granularity(updates: Tensor, regions: RegionLayout) -> Tensor:
    """Sum up what a token's cells of all granularities hold: ``(B, L, C) -> (B, N, C)``."""
    extra, *levels = updates.split(regions.sizes, dim=1)
    sides = zip(levels, regions.level_grids, regions.granularities, strict=True)
    tokens = sum(unpool_cells(u.unflatten(1, g), side, regions.grid) for u, g, side in sides)
    return torch.cat([extra, tokens.flatten(1, 2)], dim=1)


def pool_cells(x: Tensor, side: int) -> Tensor:
    """Means of cells: ``(B, H, W, C) -> (B, ceil(H / side), ceil(W / side), C)``."""
    if side == 1:
        return x
    x = F.avg_pool2d(x.permute(0, 3, 1, 2), side, ceil_mode=True, count_include_pad=False)
    return x.permute(0, 2, 3, 1)


def unpool_cells(x: Tensor, side: int, grid: tuple[int, int]) -> Tensor:
    """Give each token what its cell holds: the shapes of :func:`pool_cells`, reversed."""
    if side == 1:
        return x
    x = F.interpolate(x.permute(0, 3, 1, 2), scale_factor=side, mode='nearest')
    return x.permute(0, 2, 3, 1)[:, : grid[0], : grid[1]]
