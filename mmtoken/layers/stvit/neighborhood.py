"""Windows of one token grid that attend to the patch around them on another.

Two grids are divided into the same number of windows, for instance image tokens into windows of
7 x 7 and the semantic tokens pooled from them into windows of 3 x 3. Each window of queries attends
to a square patch of the key grid, centered on the corresponding window of keys. Patches overlap,
reach beyond the grid, and may exclude parts of the padding.

There are two forms of the same attention:

* :func:`neighborhood_attention_reference` pads the key grid and copies the patch of every window.
* :func:`neighborhood_attention` lets a group of neighboring windows attend to the union of their
  patches. The bias is the logarithm of how often a window sees a key: minus infinity for never, 0
  for once. All padding is the same key (what norm and projection make of zeros), so padding that a
  window sees n times is one key with bias log(n). That needs a fraction of the copies, and padding
  is projected once.

Source: STViT-R, arXiv 2303.08685; released detection backbone,
github.com/changsn/STViT-R-Object-Detection (MIT), whose masks this reproduces.
"""

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...runtime.reference import on_reference_path
from ..common.attention import cross_attention
from ..common.cache import cache_by_shape
from ..common.utils import ceil_div, run_block
from ..common.windows import pad_to_windows, window_partition, window_reverse

PadMask = Literal['released', 'exact'] | None

# Attention of projected queries (..., C) to keys and values (..., 2 * C), with a number of heads
Attend = Callable[[Tensor, Tensor, int], Tensor]

# Windows on a side of a group. On a CPU larger groups compute more hidden scores than they save
# copies (measured for patches of 14, 21 and 27 tokens); a GPU wants few, large kernels.
GROUP_SIDE = {'cpu': 2, 'cuda': 8}


class NeighborhoodSpec(NamedTuple):
    """Geometry of neighborhood attention: query windows and the key patch each one sees.

    Attributes:
        query_grid: ``(H, W)`` of the queries, in tokens.
        query_window_size: Side of a window of queries, in tokens.
        key_grid: ``(H, W)`` of the keys, in tokens. Grids that are no multiple of the windows are
            padded at the bottom and right.
        key_window_size: Side of a window of keys, in tokens.
        patch_size: Side of the patch of keys that a window attends to, in tokens.
        padded_hw: Trailing rows and columns of the padded key grid that count as padding.
        pad_mask: ``'exact'`` hides those rows *and* columns, and what lies outside the grid.
            ``'released'`` hides what the official checkpoints were trained with: only the corner
            where both meet, or, where one of them is 0, the other; where both are 0 nothing at
            all, the outside included. ``None`` hides nothing.
    """

    query_grid: tuple[int, int]
    query_window_size: int
    key_grid: tuple[int, int]
    key_window_size: int
    patch_size: int
    padded_hw: tuple[int, int]
    pad_mask: PadMask

    @property
    def num_windows(self) -> tuple[int, int]:
        """Rows and columns of windows."""
        height, width = self.key_grid
        return ceil_div(height, self.key_window_size), ceil_div(width, self.key_window_size)

    @property
    def margins(self) -> tuple[int, int]:
        """How far a patch reaches beyond its window, at the top left and at the bottom right."""
        extra = self.patch_size - self.key_window_size
        return extra // 2, extra - extra // 2

    @property
    def padding(self) -> tuple[int, int, int, int]:
        """Left, right, top and bottom padding of the key grid to whole windows and patches."""
        before, after = self.margins
        bottom, right = (-side % self.key_window_size for side in self.key_grid)
        return before, right + after, before, bottom + after


def attend_to_neighborhood(tokens: Tensor, spec: NeighborhoodSpec) -> tuple[Tensor, Attend]:
    """Prepare neighborhood attention, in its reference form or its fast one.

    Args:
        tokens: On the key grid, not normalized, ``(B, H, W, C)``.
        spec: The geometry.

    Returns:
        The tokens with padding of zeros, to be normalized and projected, and the attention of
        queries ``(B, H', W', C)`` to them.
    """
    if on_reference_path():
        padded = F.pad(tokens, (0, 0, *spec.padding))
        return padded, partial(neighborhood_attention_reference, spec=spec)
    padded = F.pad(tokens.flatten(1, 2), (0, 0, 0, 1))
    # Copies of overlapping patches are recomputed in backward, to save memory.
    attend = partial(neighborhood_attention, spec=spec)
    return padded, partial(run_block, attend, recompute=True)


def neighborhood_attention_reference(
    query: Tensor, key_value: Tensor, num_heads: int, spec: NeighborhoodSpec
) -> Tensor:
    """Attend from each window to a copy of its patch.

    Args:
        query: ``(B, H, W, C)``, on the query grid.
        key_value: ``(B, H', W', 2 * C)``, on the key grid with ``spec.padding`` around it, keys
            first.
        num_heads: Attention heads.
        spec: The geometry.

    Returns:
        ``(B, H, W, C)``.
    """
    size, grid = spec.query_window_size, query.shape[1:3]
    windows = window_partition(pad_to_windows(query, size), size)  # (B * windows, L, C)
    patches = _cut(key_value.permute(0, 3, 1, 2), spec).permute(0, 2, 3, 1).flatten(0, 1)
    hidden = hidden_keys(spec).to(query.device)
    bias = torch.zeros(hidden.shape, dtype=query.dtype, device=query.device)
    bias = bias.masked_fill_(hidden, float('-inf'))
    bias = bias[:, None, None].repeat(len(query), 1, 1, 1)  # (B * windows, 1, 1, K)
    return window_reverse(cross_attention(windows, patches, num_heads, bias), size, grid)


def neighborhood_attention(
    query: Tensor, key_value: Tensor, num_heads: int, spec: NeighborhoodSpec
) -> Tensor:
    """Attend from a few windows at a time to the union of their patches.

    Args:
        query: ``(B, H, W, C)``, on the query grid.
        key_value: ``(B, N + 1, 2 * C)``, keys first: the N tokens of the key grid row by row, then
            the padding token.
        num_heads: Attention heads.
        spec: The geometry.

    Returns:
        ``(B, H, W, C)``.
    """
    groups, order = plan_groups(spec, query.device, query.dtype)
    tokens, attended = query.flatten(1, 2), []
    for group in groups:
        queries = tokens.index_select(1, group.queries)
        keys = key_value.index_select(1, group.keys)
        bias = None if group.log_count is None else group.log_count[group.window]
        attended.append(cross_attention(queries, keys, num_heads, bias))
    return torch.cat(attended, dim=1).index_select(1, order).view_as(query)


class Group(NamedTuple):
    """Neighboring windows and the keys that any of them sees.

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
    """Divide the windows into square groups.

    Groups with the same position relative to the borders share the tensors that do not depend on
    where they are, so that memory does not grow with the number of windows times keys.

    Returns:
        The groups, and ``(H * W,)``: for each query of the grid, row by row, its place among those
        of all groups, one after the other. Cached, and not to be written to.
    """
    side = GROUP_SIDE.get(device.type, GROUP_SIDE['cuda'])
    (height, width), query_width = spec.key_grid, spec.query_grid[1]
    views, groups = {}, []
    for rows, columns in product(_bands(spec, 0, side), _bands(spec, 1, side)):
        pattern = rows.pattern, columns.pattern
        if pattern not in views:
            views[pattern] = _view(rows, columns, spec, device, dtype)
        window, seen, log_count = views[pattern]
        queries = rows.queries[:, None] * query_width + columns.queries
        keys = F.pad((rows.keys[:, None] * width + columns.keys).flatten(), (0, 1))
        keys[-1] = height * width
        groups.append(Group(queries.flatten(), window, keys[seen].to(device), log_count))
    order = torch.cat([group.queries for group in groups]).argsort()
    groups = (group._replace(queries=group.queries.to(device)) for group in groups)
    return tuple(groups), order.to(device)


class _Band(NamedTuple):
    """The rows, or the columns, of a group.

    Attributes:
        queries: ``(Q,)``, rows of queries, without padding.
        window: ``(Q,)``, which of the group's rows of windows each is in.
        keys: ``(K,)``, rows of keys that a patch reaches; they may lie outside the grid.
        reached: ``(windows, K)``, which of them the patches of each row of windows have.
        real, inside, padded: ``(K,)``, which of them are tokens, are in the padded grid, and count
            as padding (``spec.padded_hw``).
        pattern: The same for bands with the same position relative to the borders.
    """

    queries: Tensor
    window: Tensor
    keys: Tensor
    reached: Tensor
    real: Tensor
    inside: Tensor
    padded: Tensor
    pattern: tuple


def _bands(spec: NeighborhoodSpec, axis: int, side: int) -> list[_Band]:
    """Divide an axis into groups of ``side`` windows."""
    num_windows, size = spec.num_windows[axis], spec.query_window_size
    stride, end = spec.key_window_size, num_windows * spec.key_window_size
    num_padded = spec.padded_hw[axis]
    if spec.pad_mask == 'released':
        num_padded = num_padded or end  # a slice from minus zero is the whole axis
    bands = []
    for first in range(0, num_windows, side):
        count = min(side, num_windows - first)
        last = min((first + count) * size, spec.query_grid[axis])
        queries = torch.arange(first * size, last)
        offset = torch.arange((count - 1) * stride + spec.patch_size)
        keys = first * stride - spec.margins[0] + offset
        offset = offset - stride * torch.arange(count)[:, None]
        reached = (offset >= 0) & (offset < spec.patch_size)
        inside = (keys >= 0) & (keys < end)
        marks = inside & (keys < spec.key_grid[axis]), inside, keys >= end - num_padded
        pattern = len(queries), *torch.cat(marks).tolist()
        bands.append(_Band(queries, queries // size - first, keys, reached, *marks, pattern))
    return bands


def _view(
    rows: _Band, columns: _Band, spec: NeighborhoodSpec, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What the windows of a group see.

    Returns:
        The window of each query, ``(Q,)``; which of the keys in reach any window sees, the padding
        last, ``(K + 1,)``; and the logarithm of how often each window sees each of those.
    """
    window = (rows.window[:, None] * len(columns.reached) + columns.window).flatten()
    count = _count_keys(rows, columns, spec)
    seen = count.any(dim=0)
    count = count[:, seen]
    # Not the logarithm of 0, which libraries compute a hundred times more slowly than others.
    log_count = count.clamp(min=1).double().log().masked_fill_(count == 0, float('-inf'))
    log_count = log_count.to(device, dtype) if log_count.any() else None
    return window.to(device), seen, log_count


def _count_keys(rows: _Band, columns: _Band, spec: NeighborhoodSpec) -> Tensor:
    """How often each window of a group sees each key, the padding last: ``(windows, K + 1)``."""
    reached = rows.reached[:, None, :, None] & columns.reached[:, None]
    reached = reached.flatten(2).flatten(0, 1)  # (windows, K)
    visible = reached
    if spec.pad_mask is not None:
        hidden = ~(rows.inside[:, None] & columns.inside)
        if spec.pad_mask == 'released':
            hidden |= rows.padded[:, None] & columns.padded
        else:
            hidden |= rows.padded[:, None] | columns.padded
        visible = reached & ~hidden.flatten()
        # A softmax in which every key is hidden alike hides none.
        visible = torch.where(visible.any(dim=1, keepdim=True), visible, reached)
    real = (rows.real[:, None] & columns.real).flatten()
    padding = (visible & ~real).sum(dim=1, keepdim=True)
    return torch.cat([visible & real, padding], dim=1)


@cache_by_shape
def hidden_keys(spec: NeighborhoodSpec) -> Tensor:
    """Which keys of its patch a window must not attend to: ``(windows, patch_size ** 2)``."""
    ends = tuple(n * spec.key_window_size for n in spec.num_windows)
    rows, columns = torch.arange(ends[0])[:, None], torch.arange(ends[1])
    if spec.pad_mask == 'released':
        # A slice from minus zero is the whole axis, and the two slices are intersected.
        rows, columns = (
            place >= end - (count or end)
            for place, end, count in zip((rows, columns), ends, spec.padded_hw, strict=True)
        )
        hidden = rows & columns
    else:
        hidden = (rows >= ends[0] - spec.padded_hw[0]) | (columns >= ends[1] - spec.padded_hw[1])
    hidden = _cut(F.pad(hidden, spec.margins * 2, value=True)[None], spec)[0]
    if spec.pad_mask is None:
        return torch.zeros_like(hidden)
    # A softmax in which every key is hidden alike hides none.
    return hidden & ~hidden.all(dim=1, keepdim=True)


def _cut(grid: Tensor, spec: NeighborhoodSpec) -> Tensor:
    """Overlapping patches of a padded grid: ``(..., H, W) -> (..., windows, patch_size ** 2)``."""
    size, stride = spec.patch_size, spec.key_window_size
    return grid.unfold(-2, size, stride).unfold(-2, size, stride).flatten(-4, -3).flatten(-2)
