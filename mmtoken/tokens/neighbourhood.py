"""Windows of queries that attend to the patch of a token grid around them.

Window ``(i, j)`` attends to a ``size x size`` patch whose top-left corner lies at
``(stride * i - before, stride * j - before)``. Patches overlap, reach beyond the grid, and may
exclude parts of the padding. All padding is the same token (what a zero becomes in LayerNorm and
projection), so a grid of H * W tokens has H * W + 1 distinct keys, and a neighbourhood is a list
of indices into them.

Two forms of the same attention:

* *gathered* copies each patch. It is the obvious reference, and the cheaper form on large grids.
* *whole grid* attends to all distinct keys at once, under a bias that is the logarithm of how
  often a window sees a key: minus infinity for never, 0 for once, log(n) for padding seen n times.

Source: STViT-R, arXiv 2303.08685; released detection backbone,
github.com/changsn/STViT-R-Object-Detection (MIT), whose masks this reproduces.
"""

from functools import lru_cache
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import attention, join_heads, split_heads

PadMask = Literal['released', 'exact'] | None


class Neighbourhoods(NamedTuple):
    """Where each window of queries finds its keys, for one grid size.

    Attributes:
        index: ``(windows, K)``, into the tokens of an image, row by row; ``num_tokens`` stands
            for padding.
        hidden: ``(windows, K)``, True where a window must not attend; None if nowhere.
        log_count: ``(windows, num_tokens + 1)``, logarithm of how often a window sees each key.
        num_tokens: Tokens of the grid, without padding.
    """

    index: Tensor
    hidden: Tensor | None
    log_count: Tensor
    num_tokens: int


@lru_cache(maxsize=32)
def plan_neighbourhoods(
    grid: tuple[int, int],
    size: int,
    stride: int,
    hidden_rows: int,
    hidden_columns: int,
    pad_mask: PadMask,
    device: torch.device,
    dtype: torch.dtype,
) -> Neighbourhoods:
    """List the keys of every window of a grid.

    Args:
        grid: ``(H, W)`` in tokens. A grid that is no multiple of ``stride`` is padded at the
            bottom and right.
        size: Side of a patch, in tokens.
        stride: Side of a window on this grid, in tokens.
        hidden_rows, hidden_columns: Trailing rows and columns of the padded grid that the mask
            is about, in tokens.
        pad_mask: ``'exact'`` hides those rows *and* columns, and what lies outside the grid.
            ``'released'`` hides what the official checkpoints were trained with: only the corner
            where both meet, or, where one of them is 0, the other; where both are 0 nothing at
            all, the outside included. ``None`` hides nothing.

    Returns:
        The plan; its tensors are cached per argument tuple and must not be written to.
    """
    height, width = grid
    bottom, right = -height % stride, -width % stride
    before, after = (size - stride) // 2, (size - stride + 1) // 2
    around = (before, right + after, before, bottom + after)

    # Cached plans outlive inference mode, and autograd cannot save tensors that were made in it.
    with torch.inference_mode(False):
        token = torch.arange(height * width).view(height, width)
        token = F.pad(token, around, value=height * width)

        # Released: `-0:` is the whole axis, and the two slices are intersected.
        rows = torch.zeros(height + bottom, 1, dtype=torch.bool)
        columns = torch.zeros(1, width + right, dtype=torch.bool)
        if pad_mask == 'released':
            rows[-hidden_rows:] = True
            columns[:, -hidden_columns:] = True
            hidden = rows & columns
        else:
            rows[rows.shape[0] - hidden_rows :] = True
            columns[:, columns.shape[1] - hidden_columns :] = True
            hidden = rows | columns
        hidden = F.pad(hidden, (before, after, before, after), value=True)

        index = _patches(token, size, stride)
        hidden = _patches(hidden, size, stride)
        # A softmax in which every key is hidden alike hides none.
        hidden &= ~hidden.all(dim=1, keepdim=True)
        if pad_mask is None:
            hidden[:] = False

        count = torch.zeros(index.shape[0], height * width + 1, dtype=torch.float64)
        count.scatter_add_(1, index, (~hidden).double())
        return Neighbourhoods(
            index=index.to(device),
            hidden=hidden.to(device) if hidden.any() else None,
            log_count=count.log().to(device, dtype),
            num_tokens=height * width,
        )


def _patches(grid: Tensor, size: int, stride: int) -> Tensor:
    """Overlapping patches: ``(H, W) -> (windows, size * size)``."""
    patches = grid.unfold(0, size, stride).unfold(1, size, stride)
    return patches.reshape(-1, size * size)


def neighbourhood_attention(
    query: Tensor, key: Tensor, value: Tensor, plan: Neighbourhoods, num_heads: int
) -> Tensor:
    """Attend from windows of queries to the patches around them.

    Args:
        query: ``(B, windows * Q, C)``, window after window.
        key, value: ``(B, plan.num_tokens + 1, C)``, the tokens of each image row by row, then the
            padding token.
        plan: From :func:`plan_neighbourhoods`.

    Returns:
        ``(B, windows * Q, C)``.
    """
    # Gathering costs copies of all patches, the whole grid costs scores of keys out of reach.
    if plan.num_tokens < 2 * plan.index.shape[1]:
        return attend_whole_grid(query, key, value, plan, num_heads)
    return attend_gathered(query, key, value, plan, num_heads)


def attend_gathered(
    query: Tensor, key: Tensor, value: Tensor, plan: Neighbourhoods, num_heads: int
) -> Tensor:
    """:func:`neighbourhood_attention` with a copy of every patch: the reference."""
    batch, _, channels = key.shape
    windows, length = plan.index.shape
    bias = None
    if plan.hidden is not None:
        bias = query.new_zeros(plan.hidden.shape).masked_fill_(plan.hidden, float('-inf'))
        bias = bias[:, None, None].repeat(batch, 1, 1, 1)
    # index_select, because its backward is a plain index_add
    patches = [t.index_select(1, plan.index.flatten()) for t in (key, value)]
    out = attention(
        split_heads(query.reshape(batch * windows, -1, channels), num_heads),
        *(split_heads(t.view(batch * windows, length, channels), num_heads) for t in patches),
        bias,
    )
    return join_heads(out).view_as(query)


def attend_whole_grid(
    query: Tensor, key: Tensor, value: Tensor, plan: Neighbourhoods, num_heads: int
) -> Tensor:
    """:func:`neighbourhood_attention` without a copy of any patch."""
    queries_per_window = query.shape[1] // plan.log_count.shape[0]
    bias = plan.log_count.repeat_interleave(queries_per_window, dim=0)
    out = attention(*(split_heads(t, num_heads) for t in (query, key, value)), bias)
    return join_heads(out)
