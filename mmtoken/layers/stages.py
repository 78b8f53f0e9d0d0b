"""Stages of a Swin: blocks on a grid of one size, and the layer that leads to the next."""

from collections.abc import Callable, Sequence

import torch
import torch.nn as nn
from timm.layers import trunc_normal_
from torch import Tensor

from ..tokens.positions import resample
from .recompute import run_block
from .semantic import (
    UNIT_DEPTH,
    GlobalBlock,
    LocalBlock,
    PoolBlock,
    RecoverBlock,
    ReduceBlock,
    Windowing,
    semantic_unit,
)
from .semantic_global import GlobalRecoverBlock, GlobalReduceBlock, OwnPoolBlock
from .swin import SwinBlock

CENTER_WINDOWS = 2  # windows on a side of the grid that learned centers are laid out for


class SwinStage(nn.Module):
    """Swin blocks, every other one with shifted windows.

    Args:
        common: Arguments of every block.
        drop_path: Stochastic depth rate of each block.
        window_size: Window side, in tokens.
        shift_always: Shift even a grid that is no larger than a window.
        downsample: Leads to the next stage; None after the last.
        with_cp: Recompute activations in backward, block by block.
        blocks: What makes each block, :class:`~mmtoken.layers.swin.SwinBlock` by default.
    """

    def __init__(
        self,
        common: dict,
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
                **common,
            )
            for j, (block, rate) in enumerate(zip(blocks, drop_path, strict=True))
        )
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """``(B, H, W, C) -> (B, H, W, C)``; the caller downsamples."""
        for block in self.blocks:
            x = run_block(block, x, recompute=self.with_cp)
        return x


class SemanticStage(nn.Module):
    """Units of six blocks on semantic tokens, in one flat list as in the official checkpoints.

    Args:
        units: Six blocks each.
        windows: How the stage is cut.
        centers: Channels of the learned centers of the first unit; None for none.
        downsample: Leads to the next stage; None after the last.
        with_cp: Recompute activations in backward, unit by unit.
    """

    def __init__(
        self,
        units: Sequence[Sequence[nn.Module]],
        windows: Windowing,
        centers: int | None,
        downsample: nn.Module | None,
        with_cp: bool,
    ) -> None:
        super().__init__()
        self.windows = windows
        self.with_cp = with_cp
        if centers is not None:
            length = (CENTER_WINDOWS * windows.pooled_size) ** 2
            self.semantic_token2 = nn.Parameter(torch.zeros(1, length, centers))
            trunc_normal_(self.semantic_token2, std=0.02)
        else:
            self.semantic_token2 = None
        self.blocks = nn.ModuleList(block for unit in units for block in unit)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """``(B, H, W, C) -> (B, H, W, C)``; the caller downsamples."""
        for j in range(0, len(self.blocks), UNIT_DEPTH):
            unit = list(self.blocks[j : j + UNIT_DEPTH])
            centers = self.centers(x.shape[1:3]) if j == 0 else None
            x = run_block(semantic_unit, x, unit, self.windows, centers, recompute=self.with_cp)
        return x

    def centers(self, grid: Sequence[int]) -> Tensor | None:
        """Learned centers, resampled to the semantic tokens of a grid: ``(1, h, w, C)``."""
        if self.semantic_token2 is None:
            return None
        size, pooled_size, _ = self.windows
        grid = tuple(-(-side // size) * pooled_size for side in grid)
        old = (CENTER_WINDOWS * pooled_size,) * 2
        return resample(self.semantic_token2, old, grid, 'bicubic', True)


def dense_unit(
    common: dict,
    drop_path: Sequence[float],
    windows: Windowing,
    key_sizes: Sequence[int],
    conv_pos: bool,
) -> list[nn.Module]:
    """The six blocks of a unit for dense prediction: attention reaches the neighbourhood.

    Args:
        common: Arguments of every block.
        drop_path: Stochastic depth rates of the six.
        windows: How the stage is cut.
        key_sizes: Sides of the patches that pool, reduce and recover block attend to, in tokens.
        conv_pos: See :class:`~mmtoken.layers.semantic.PoolBlock`.
    """
    rates, (near, far, recover) = drop_path, key_sizes
    return [
        SwinBlock(window_size=windows.size, drop_path=rates[0], **common),
        PoolBlock(key_size=near, conv_pos=conv_pos, drop_path=rates[1], **common),
        ReduceBlock(key_size=far, drop_path=rates[2], **common),
        LocalBlock(drop_path=rates[3], **common),
        GlobalBlock(drop_path=rates[4], **common),
        RecoverBlock(key_size=recover, drop_path=rates[5], **common),
    ]


def classification_unit(
    common: dict,
    drop_path: Sequence[float],
    windows: Windowing,
    conv_pos: bool,
    shortcut: bool,
) -> list[nn.Module]:
    """The six blocks of a unit for classification: attention reaches the whole image.

    The pool block's patch is half a window wider than its window, 10 tokens for windows of 7.
    Arguments as for :func:`dense_unit`; ``shortcut`` as for
    :class:`~mmtoken.layers.semantic_global.OwnPoolBlock`.
    """
    rates, near = drop_path, windows.size + windows.size // 2
    pool = dict(key_size=near, conv_pos=conv_pos, shortcut=shortcut, drop_path=rates[1])
    return [
        SwinBlock(window_size=windows.size, drop_path=rates[0], **common),
        OwnPoolBlock(**pool, **common),
        GlobalReduceBlock(drop_path=rates[2], **common),
        LocalBlock(drop_path=rates[3], **common),
        GlobalBlock(drop_path=rates[4], **common),
        GlobalRecoverBlock(drop_path=rates[5], **common),
    ]
