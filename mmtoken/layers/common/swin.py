"""Shifted-window attention blocks and patch merging on a channels-last token grid.

Source: Swin Transformer, arXiv 2103.14030, section 3. Parameter names are the official ones.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, trunc_normal_
from torch import Tensor

from ...runtime.reference import is_compiling
from .attention import attention, join_heads
from .cache import cache_by_shape
from .utils import run_block
from .windows import pad_to_windows, shifted_window_mask, window_partition, window_reverse


class WindowAttention(nn.Module):
    """Multi-head self-attention inside windows, with a learned relative position bias.

    Args:
        embed_dims: Channels.
        num_heads: Attention heads.
        window_size: Window side, in tokens.
        linear: Makes both projections, ``(embed_dims, out_dims)`` to a layer.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        window_size: int,
        linear: Callable[[int, int], nn.Module] = nn.Linear,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.window_size = window_size
        self.relative_position_bias_table = nn.Parameter(
            torch.zeros((2 * window_size - 1) ** 2, num_heads)
        )
        trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.qkv = linear(embed_dims, 3 * embed_dims)
        self.proj = linear(embed_dims, embed_dims)

    def forward(self, windows: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend inside each window.

        Args:
            windows: ``(B * windows, L, C)`` with ``L = window_size ** 2``.
            mask: Additive, ``(windows, 1, L, L)``, from
                :func:`~mmtoken.layers.common.windows.shifted_window_mask`.

        Returns:
            ``(B * windows, L, C)``.
        """
        bias = self.position_bias()
        if mask is not None:
            images = windows.shape[0] // mask.shape[0]
            bias = (bias + mask).repeat(images, 1, 1, 1)
        return self.proj(self.attend(self.qkv(windows), bias))

    def attend(self, qkv: Tensor, bias: Tensor) -> Tensor:
        """``(windows, L, 3 * C) -> (windows, L, C)``; ``bias`` is ``(windows, heads, L, L)``."""
        query, key, value = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return join_heads(attention(query, key, value, bias))

    def position_bias(self) -> Tensor:
        """Learned bias of each pair of tokens in a window: ``(1, heads, L, L)``."""
        table = self.relative_position_bias_table
        # Tables of several sizes in one place are more than torch.compile takes as constants.
        make = relative_position_index if is_compiling() else plan_position_index
        index = make(self.window_size, table.device)
        length = self.window_size**2
        return table[index.flatten()].view(length, length, -1).permute(2, 0, 1).unsqueeze(0)


def relative_position_index(size: int, device: torch.device) -> Tensor:
    """Row of the bias table for each pair of tokens of a window: ``(size ** 2, size ** 2)``."""
    place = torch.arange(size, device=device)
    row, column = torch.meshgrid(place, place, indexing='ij')
    row, column = row.flatten(), column.flatten()
    down = row[:, None] - row[None, :] + size - 1
    across = column[:, None] - column[None, :] + size - 1
    return down * (2 * size - 1) + across


plan_position_index = cache_by_shape(relative_position_index)


class SwinBlock(nn.Module):
    """Window attention and MLP, each behind a LayerNorm and with a residual.

    Args:
        embed_dims: Channels.
        num_heads: Attention heads.
        window_size: Window side, in tokens.
        shift: Cyclic shift of the windows, in tokens.
        shift_always: Shift even a grid that is no larger than a window, as Swin's detectors do
            and its classifiers do not.
        mlp_ratio: Hidden width of the MLP over ``embed_dims``.
        drop_path: Stochastic depth rate.
        linear: Makes the projections of attention, see :class:`WindowAttention`.
        mlp: Makes the MLP, ``(embed_dims, hidden_dims)`` to a layer.

    Example:
        >>> block = SwinBlock(embed_dims=32, num_heads=2, window_size=7, shift=3)
        >>> block(torch.zeros(1, 10, 16, 32)).shape
        torch.Size([1, 10, 16, 32])
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        window_size: int = 7,
        shift: int = 0,
        shift_always: bool = True,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        linear: Callable[[int, int], nn.Module] = nn.Linear,
        mlp: Callable[[int, int], nn.Module] = Mlp,
    ) -> None:
        super().__init__()
        self.window_size = window_size
        self.shift = shift
        self.shift_always = shift_always
        self.norm1 = nn.LayerNorm(embed_dims)
        self.attn = WindowAttention(embed_dims, num_heads, window_size, linear)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(embed_dims)
        self.mlp = mlp(embed_dims, int(embed_dims * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        """``(B, H, W, C) -> (B, H, W, C)``, any H and W."""
        x = x + self.drop_path(self.attend(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def attend(self, x: Tensor) -> Tensor:
        """Attention in shifted windows: ``(B, H, W, C) -> (B, H, W, C)``.

        As in Swin, padding is added behind the norm and attended to like any token.
        """
        grid, size = x.shape[1:3], self.window_size
        shift = self.shift_on(grid)
        x, mask = pad_to_windows(x, size), None  # (B, H', W', C), whole windows
        padded = x.shape[1:3]
        if shift:
            x = x.roll((-shift, -shift), dims=(1, 2))
            mask = shifted_window_mask(tuple(grid), size, shift, x.device, x.dtype)
        windows = self.attn(window_partition(x, size), mask)  # (B * windows, L, C)
        if not shift:
            return window_reverse(windows, size, grid)
        x = window_reverse(windows, size, padded).roll((shift, shift), dims=(1, 2))
        return x[:, : grid[0], : grid[1]]

    def shift_on(self, grid: Sequence[int]) -> int:
        """Shift of the windows on a grid ``(H, W)``, in tokens."""
        return self.shift if self.shift_always or min(grid) > self.window_size else 0


class PatchMerging(nn.Module):
    """Concatenate each 2 x 2 group of tokens and project it: half the grid, twice the channels."""

    def __init__(self, embed_dims: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * embed_dims)
        self.reduction = nn.Linear(4 * embed_dims, 2 * embed_dims, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, H, W, C) -> (B, ceil(H / 2), ceil(W / 2), 2 * C)``."""
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        top, bottom = x[:, 0::2], x[:, 1::2]
        group = [top[:, :, 0::2], bottom[:, :, 0::2], top[:, :, 1::2], bottom[:, :, 1::2]]
        return self.reduction(self.norm(torch.cat(group, dim=-1)))


class SwinStage(nn.Module):
    """Swin blocks, every other one with shifted windows.

    Args:
        block_kwargs: Arguments of every block.
        drop_path: Stochastic depth rate of each block.
        window_size: Window side, in tokens.
        shift_always: Shift even a grid that is no larger than a window.
        downsample: Leads to the next stage; None behind the last.
        with_cp: Recompute activations in backward, block by block.
        blocks: What makes each block, :class:`~mmtoken.layers.common.swin.SwinBlock` by default.
    """

    def __init__(
        self,
        block_kwargs: dict,
        drop_path: Sequence[float],
        window_size: int,
        shift_always: bool,
        downsample: nn.Module | None,
        with_cp: bool,
        blocks: Sequence[Callable[..., SwinBlock]] | None = None,
    ) -> None:
        super().__init__()
        self.with_cp = with_cp
        blocks = blocks or [SwinBlock] * len(drop_path)
        self.blocks = nn.ModuleList(
            block(
                window_size=window_size,
                shift=window_size // 2 * (j % 2),
                shift_always=shift_always,
                drop_path=rate,
                **block_kwargs,
            )
            for j, (block, rate) in enumerate(zip(blocks, drop_path, strict=True))
        )
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """``(B, H, W, C) -> (B, H, W, C)``; the caller downsamples."""
        for block in self.blocks:
            x = run_block(block, x, recompute=self.with_cp)
        return x
