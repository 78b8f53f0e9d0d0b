"""Windows of one token grid that attend to the patch around them on another.

Two grids are cut into the same number of windows, for instance image tokens into windows of 7 x 7
and the semantic tokens pooled from them into windows of 3 x 3. Window ``(i, j)`` of the queries
attends to a ``size x size`` patch of the keys whose top-left corner lies at ``(stride * i - before,
stride * j - before)``. Patches overlap, reach beyond the grid, and may exclude parts of the
padding.

Two forms of the same attention:

* :func:`neighborhood_attention_reference`, the reference, pads the key grid and copies the patch of every window.
* :func:`neighborhood_attention` takes a few neighbouring windows at a time to the union of their patches,
  under a bias that is the logarithm of how often a window sees a key: minus infinity for never, 0
  for once. All padding is one and the same key (what a zero becomes in norm and projection), which
  a window may see n times, hence log(n). A fraction of the copies, and no work on padding.

Source: STViT-R, arXiv 2303.08685; released detection backbone,
github.com/changsn/STViT-R-Object-Detection (MIT), whose masks this reproduces.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.attention import attention, join_heads, split_heads
from ..common.cache import cache_by_shape
from ..common.windows import pad_to_windows, window_index, window_partition, window_reverse

PadMask = Literal['released', 'exact'] | None

# Windows on a side of a group. On a CPU more would compute more scores that are thrown away than
# it saves copies (measured for patches of 14, 21 and 27 tokens); a GPU wants few, large kernels.
GROUP_SIDE = {'cpu': 2, 'cuda': 8}


class NeighborhoodSpec(NamedTuple):
    """Who attends to whom, in numbers.

    Attributes:
        query_grid: ``(H, W)`` of the queries, in tokens.
        query_size: Side of a window of queries, in tokens.
        key_grid: ``(H, W)`` of the keys, in tokens. Grids that are no multiple of the windows are
            padded at the bottom and right.
        stride: Side of a window of keys, in tokens.
        size: Side of the patch of keys that a window attends to, in tokens.
        hidden: Trailing rows and columns of the padded key grid that the mask is about, in tokens.
        pad_mask: ``'exact'`` hides those rows *and* columns, and what lies outside the grid.
            ``'released'`` hides what the official checkpoints were trained with: only the corner
            where both meet, or, where one of them is 0, the other; where both are 0 nothing at
            all, the outside included. ``None`` hides nothing.
    """

    query_grid: tuple[int, int]
    query_size: int
    key_grid: tuple[int, int]
    stride: int
    size: int
    hidden: tuple[int, int]
    pad_mask: PadMask

    @property
    def num_windows(self) -> tuple[int, int]:
        """Rows and columns of windows."""
        height, width = self.key_grid
        return -(-height // self.stride), -(-width // self.stride)

    @property
    def padding(self) -> tuple[int, int, int, int]:
        """Left, right, top and bottom padding of the key grid, the surroundings included."""
        before, after = (self.size - self.stride) // 2, (self.size - self.stride + 1) // 2
        bottom, right = (-side % self.stride for side in self.key_grid)
        return before, right + after, before, bottom + after


def neighborhood_attention_reference(
    query: Tensor, key_value: Tensor, spec: NeighborhoodSpec, num_heads: int
) -> Tensor:
    """Attend from each window to a copy of its patch: the reference.

    Args:
        query: ``(B, H, W, C)``, on the query grid.
        key_value: ``(B, H', W', 2 * C)``, on the key grid with ``spec.padding`` around it, keys
            first.
        hood: Who attends to whom.
        num_heads: Attention heads.

    Returns:
        ``(B, H, W, C)``.
    """
    batch, grid, channels = query.shape[0], query.shape[1:3], query.shape[-1]
    windows = window_partition(pad_to_windows(query, spec.query_size), spec.query_size)
    patches = _cut(key_value.permute(0, 3, 1, 2), spec).permute(0, 2, 3, 1).flatten(0, 1)
    key, value = patches.chunk(2, dim=-1)
    hidden = _hidden_keys(spec)
    bias = torch.zeros(hidden.shape, dtype=query.dtype, device=query.device)
    bias = bias.masked_fill_(hidden.to(query.device), float('-inf'))
    bias = bias[:, None, None].repeat(batch, 1, 1, 1)
    out = join_heads(attention(*(split_heads(t, num_heads) for t in (windows, key, value)), bias))
    return window_reverse(out.view(-1, spec.query_size**2, channels), spec.query_size, grid)


def neighborhood_attention(
    query: Tensor, key_value: Tensor, spec: NeighborhoodSpec, num_heads: int
) -> Tensor:
    """Attend from a few windows at a time to the union of their patches.

    Args:
        query: ``(B, H, W, C)``, on the query grid.
        key_value: ``(B, N + 1, 2 * C)``, keys first: the N tokens of the key grid row by row, then
            the padding token.
        hood: Who attends to whom.
        num_heads: Attention heads.

    Returns:
        ``(B, H, W, C)``.
    """
    groups, order = plan_groups(spec, query.device, query.dtype)
    tokens = query.flatten(1, 2)

    def attend(group: Group) -> Tensor:
        queries = tokens.index_select(1, group.queries)
        keys = key_value.index_select(1, group.keys).chunk(2, dim=-1)
        bias = None if group.log_count is None else group.log_count[group.window]
        return join_heads(attention(*(split_heads(t, num_heads) for t in (queries, *keys)), bias))

    attended = torch.cat([attend(group) for group in groups], dim=1)
    return attended.index_select(1, order).view_as(query)


class Group(NamedTuple):
    """Neighbouring windows and the keys that any of them sees.

    Attributes:
        queries: ``(Q,)``, indices into the query grid, row by row.
        window: ``(Q,)``, which of the group's windows each query is in.
        keys: ``(K,)``, indices into the key grid, row by row; ``H * W`` stands for padding.
        log_count: ``(windows, K)``, logarithm of how often a window sees each key; None if every
            window sees every key once.
    """

    queries: Tensor
    window: Tensor
    keys: Tensor
    log_count: Tensor | None


@cache_by_shape
def plan_groups(
    spec: NeighborhoodSpec, device: torch.device, dtype: torch.dtype
) -> tuple[tuple[Group, ...], Tensor]:
    """Deal the windows out into square groups.

    What a group sees is worked out once for all groups that lie alike to the border, of which there
    are a few in each direction: it is as large as a group, whatever the grid.

    Returns:
        The groups, and ``(H * W,)``: where the queries of the grid, row by row, are found in those
        of all groups, one after the other. Cached, and not to be written to.
    """
    side = GROUP_SIDE.get(device.type, GROUP_SIDE['cuda'])
    rows, columns = (_bands(spec, axis, side) for axis in (0, 1))
    patterns: dict[tuple, _Pattern] = {}
    groups = []
    for down in rows:
        for across in columns:
            alike = down.marks, across.marks, down.queries, across.queries
            if alike not in patterns:
                patterns[alike] = _pattern(down, across, spec, device, dtype)
            groups.append(_group(patterns[alike], down, across, spec))
    order = torch.cat([g.queries for g in groups]).argsort()
    groups = (g._replace(queries=g.queries.to(device), keys=g.keys.to(device)) for g in groups)
    return tuple(groups), order.to(device)


class _Band(NamedTuple):
    """The rows, or the columns, of a group.

    Attributes:
        first_query: The first row of queries.
        queries: How many rows of queries, without padding.
        first_key: The first row of keys that any window's patch reaches; it may lie outside.
        marks: Of each such row of keys, whether it is real, inside of the padded grid, and among
            those that the mask is about.
        real, inside, masked: The same as tensors, ``(K,)``.
        reached: Which of them the patch of each row of windows has, ``(windows, K)``.
    """

    first_query: int
    queries: int
    first_key: int
    marks: tuple[tuple[bool, bool, bool], ...]
    real: Tensor
    inside: Tensor
    masked: Tensor
    reached: Tensor


def _bands(spec: NeighborhoodSpec, axis: int, side: int) -> list[_Band]:
    """Cut an axis into groups of ``side`` windows."""
    windows, stride = spec.num_windows[axis], spec.stride
    before = (spec.size - stride) // 2
    end, count = windows * stride, spec.hidden[axis]
    if spec.pad_mask == 'released':
        count = count or end  # a slice from minus zero is the whole axis
    bands = []
    for first in range(0, windows, side):
        number = min(side, windows - first)
        start, query = first * stride - before, first * spec.query_size
        length = (number - 1) * stride + spec.size
        marks = tuple(
            (0 <= place < spec.key_grid[axis], 0 <= place < end, place >= end - count)
            for place in range(start, start + length)
        )
        offset = torch.arange(length) - stride * torch.arange(number)[:, None]
        reached = (offset >= 0) & (offset < spec.size)
        queries = min(number * spec.query_size, spec.query_grid[axis] - query)
        bands.append(_Band(query, queries, start, marks, *torch.tensor(marks).T, reached))
    return bands


class _Pattern(NamedTuple):
    """What groups that lie alike have in common, in rows and columns from their first ones.

    Attributes:
        query_row, query_column, window: Of each query, ``(Q,)``.
        key_row, key_column: Of each key but the padding, ``(K,)``.
        sees_padding: Whether padding is the last key.
        log_count: As in :class:`Group`, on the device.
    """

    query_row: Tensor
    query_column: Tensor
    window: Tensor
    key_row: Tensor
    key_column: Tensor
    sees_padding: bool
    log_count: Tensor | None


def _pattern(
    down: _Band, across: _Band, spec: NeighborhoodSpec, device: torch.device, dtype: torch.dtype
) -> _Pattern:
    queries = window_index((down.queries, across.queries), spec.query_size)
    real_query = queries < down.queries * across.queries
    queries, window = queries[real_query], real_query.nonzero()[:, 0]

    count = _count_keys(down, across, spec)
    seen = count.any(dim=0)
    count = count[:, seen]
    # Not the logarithm of 0, which libraries compute a hundred times more slowly than others.
    log_count = count.clamp(min=1).double().log().masked_fill_(count == 0, float('-inf'))
    log_count = log_count.to(dtype)
    keys, width = seen[:-1].nonzero().flatten(), len(across.marks)
    return _Pattern(
        queries // across.queries, queries % across.queries, window.to(device),
        keys // width, keys % width, bool(seen[-1]),
        log_count.to(device) if log_count.any() else None,
    )  # fmt: skip


def _count_keys(down: _Band, across: _Band, spec: NeighborhoodSpec) -> Tensor:
    """How often each window of a group sees each key, the padding last: ``(windows, K + 1)``."""
    reached = down.reached[:, None, :, None] & across.reached[:, None]
    reached = reached.flatten(2).flatten(0, 1)  # (windows, K)
    visible = reached
    if spec.pad_mask is not None:
        hidden = ~(down.inside[:, None] & across.inside)
        if spec.pad_mask == 'released':
            hidden |= down.masked[:, None] & across.masked
        else:
            hidden |= down.masked[:, None] | across.masked
        visible = reached & ~hidden.flatten()
        # A softmax in which every key is hidden alike hides none.
        visible = torch.where(visible.any(dim=1, keepdim=True), visible, reached)
    real = (down.real[:, None] & across.real).flatten()
    padding = (visible & ~real).sum(dim=1, keepdim=True)
    return torch.cat([visible & real, padding], dim=1)


def _group(pattern: _Pattern, down: _Band, across: _Band, spec: NeighborhoodSpec) -> Group:
    """Put a pattern where a group is."""
    (_, query_width), (height, width) = spec.query_grid, spec.key_grid
    first_query = down.first_query * query_width + across.first_query
    queries = pattern.query_row * query_width + pattern.query_column + first_query
    keys = pattern.key_row * width + pattern.key_column
    keys = keys + (down.first_key * width + across.first_key)
    if pattern.sees_padding:
        keys = F.pad(keys, (0, 1), value=height * width)
    return Group(queries, pattern.window, keys, pattern.log_count)


@cache_by_shape
def _hidden_keys(spec: NeighborhoodSpec) -> Tensor:
    """Which places of its patch a window must not attend to: ``(windows, size * size)``."""
    rows, columns = (n * spec.stride for n in spec.num_windows)
    low, right = torch.arange(rows)[:, None], torch.arange(columns)
    if spec.pad_mask == 'released':
        # A slice from minus zero is the whole axis, and the two slices are intersected.
        low, right = (
            place >= end - (count or end)
            for place, end, count in zip((low, right), (rows, columns), spec.hidden, strict=True)
        )
        hidden = low & right
    else:
        hidden = (low >= rows - spec.hidden[0]) | (right >= columns - spec.hidden[1])
    before, after = (spec.size - spec.stride) // 2, (spec.size - spec.stride + 1) // 2
    hidden = F.pad(hidden, (before, after, before, after), value=True)
    hidden = _cut(hidden[None], spec)[0]
    if spec.pad_mask is None:
        return torch.zeros_like(hidden)
    # A softmax in which every key is hidden alike hides none.
    return hidden & ~hidden.all(dim=1, keepdim=True)


def _cut(grid: Tensor, spec: NeighborhoodSpec) -> Tensor:
    """Overlapping patches of a padded grid: ``(..., H', W') -> (..., windows, size * size)``."""
    patches = grid.unfold(-2, spec.size, spec.stride).unfold(-2, spec.size, spec.stride)
    return patches.flatten(-4, -3).flatten(-2)
