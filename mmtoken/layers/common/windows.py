"""Non-overlapping windows over a token grid, and the attention mask of shifted ones.

Source: Swin Transformer, arXiv 2103.14030, section 3.2.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .cache import cache_by_shape
from .utils import ceil_div


def pad_to_windows(x: Tensor, size: int) -> Tensor:
    """Zero-pad a token grid ``(B, H, W, C)`` at the bottom and right to whole windows."""
    height, width = x.shape[1:3]
    bottom, right = -height % size, -width % size
    return F.pad(x, (0, 0, 0, right, 0, bottom)) if bottom or right else x


def window_partition(x: Tensor, size: int) -> Tensor:
    """Divide a token grid into windows.

    Args:
        x: Tokens, ``(B, H, W, C)``; H and W are multiples of ``size``.
        size: Window side, in tokens.

    Returns:
        ``(B * windows, size * size, C)``, image after image, windows and tokens row by row.

    Inverse: :func:`window_reverse`.
    """
    batch, height, width, channels = x.shape
    x = x.view(batch, height // size, size, width // size, size, channels)
    return x.transpose(2, 3).reshape(-1, size * size, channels)


def window_reverse(windows: Tensor, size: int, grid: tuple[int, int]) -> Tensor:
    """Put windows back on their padded grid and crop it: ``(B * windows, L, C) -> (B, H, W, C)``.

    Args:
        windows: As :func:`window_partition` returns them.
        size: Window side, in tokens.
        grid: ``(H, W)`` before padding, in tokens.
    """
    height, width = grid
    rows, columns = ceil_div(height, size), ceil_div(width, size)
    channels = windows.shape[-1]
    x = windows.view(-1, rows, columns, size, size, channels).transpose(2, 3)
    return x.reshape(-1, rows * size, columns * size, channels)[:, :height, :width]


def max_pool_windows(x: Tensor, size: int, pooled: int) -> Tensor:
    """Max-pool every window of a token grid to ``pooled * pooled`` tokens.

    The bins are those of adaptive pooling: for 7 to 3 they are rows 0-2, 2-4 and 4-6, and so
    overlap. Taking the maxima of slices is several times faster than pooling window by window.

    Args:
        x: Tokens, ``(B, H, W, C)``; H and W are multiples of ``size``.
        size: Window side, in tokens.
        pooled: Side of the pooled window, in tokens.

    Returns:
        ``(B, H / size * pooled, W / size * pooled, C)``.
    """
    batch, height, width, channels = x.shape
    bins = [(i * size // pooled, ceil_div((i + 1) * size, pooled)) for i in range(pooled)]
    x = x.view(batch, height // size, size, width // size, size, channels)
    x = torch.stack([_max_of_slices(x, 2, *span) for span in bins], dim=2)
    x = torch.stack([_max_of_slices(x, 4, *span) for span in bins], dim=3)
    # (B, window rows, pooled rows, pooled columns, window columns, C)
    return x.transpose(3, 4).reshape(
        batch, height // size * pooled, width // size * pooled, channels
    )


def _max_of_slices(x: Tensor, dim: int, start: int, stop: int) -> Tensor:
    maximum = x.select(dim, start)
    for i in range(start + 1, stop):
        maximum = torch.maximum(maximum, x.select(dim, i))
    return maximum


def window_index(grid: tuple[int, int], size: int, shift: int = 0) -> Tensor:
    """Which token is in each place of each window.

    Args:
        grid: ``(H, W)``, in tokens; padded at the bottom and right to whole windows.
        size: Window side, in tokens.
        shift: Cyclic shift of the padded grid towards the top left, in tokens.

    Returns:
        ``(windows, size * size)``, indices into the H * W tokens; H * W stands for padding.
    """
    height, width = grid
    token = torch.arange(height * width).view(grid)
    token = F.pad(token, (0, -width % size, 0, -height % size), value=height * width)
    token = token.roll((-shift, -shift), dims=(0, 1))
    return window_partition(token[None, :, :, None], size).squeeze(-1)


class ShiftMask(NamedTuple):
    """Which tokens of a window are not neighbors: only the cyclic shift brought them together.

    Only windows in the last row or column hold such tokens, so there are four patterns.

    Attributes:
        patterns: ``(4, 1, L, L)`` with ``L = size * size``, True between such tokens; the
            first has none.
        window: The pattern of each window, row by row, ``(windows,)``.
    """

    patterns: Tensor
    window: Tensor


def shift_mask(grid: tuple[int, int], size: int, shift: int) -> ShiftMask:
    """Arguments as in :func:`window_index`; the shift is not 0."""
    beyond = torch.arange(size) >= size - shift  # the seam, in a window that holds one
    part = torch.stack([torch.zeros_like(beyond), beyond]).long()
    # (row pattern, column pattern, row, column)
    region = 2 * part[:, None, :, None] + part[None, :, None, :]
    region = region.view(4, size * size)
    rows, columns = (ceil_div(side, size) for side in grid)
    last_row, last_column = (torch.arange(n) == n - 1 for n in (rows, columns))
    window = 2 * last_row[:, None].long() + last_column.long()
    return ShiftMask((region[:, None, :, None] != region[:, None, None, :]), window.flatten())


def shifted_window_mask(
    grid: tuple[int, int], size: int, shift: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Additive mask that keeps a cyclically shifted grid from attending across its seam.

    It is minus infinity where the releases of Swin have -100, whose exponentials are denormal
    numbers: equal in fp32, and several times faster on a CPU. Arguments as in
    :func:`window_index`.

    Returns:
        ``(windows, 1, L, L)`` with ``L = size * size``; 0 or minus infinity.
    """
    patterns, window = plan_mask(grid, size, shift, device, dtype)
    return patterns.index_select(0, window)


@cache_by_shape
def plan_mask(
    grid: tuple[int, int], size: int, shift: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The patterns of :func:`shifted_window_mask`, ``(4, 1, L, L)``, and that of each window."""
    apart = shift_mask(grid, size, shift)
    mask = torch.zeros(apart.patterns.shape, dtype=dtype)
    mask.masked_fill_(apart.patterns, float('-inf'))
    return mask.to(device), apart.window.to(device)
