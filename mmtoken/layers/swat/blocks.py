"""Swin blocks on structure-aware tokens.

Source: SWAT, arXiv 2111.13677, section 3.3; released code, github.com/kkahatapitiya/SWAT (MIT).
"""

from collections.abc import Callable
from functools import partial

import torch.nn as nn
from timm.layers import DropPath
from torch import Tensor

from ..common.attention import attention, join_heads
from ..common.old_tiles import chunked_apply, use_tiling
from ..common.swin import SwinBlock
from ..common.vit import NORM_EPS
from .structured import StructuredLinear, StructuredMlp, fold


class StructuredSwinBlock(SwinBlock):
    """A Swin block that mixes channels along the planes of a token, and tokens along the grid.

    Args:
        embed_dims: Channels.
        num_heads: Attention heads.
        side: Side of the planes of a token, in cells.
        attn_kernel_size: Of the convolutions inside the tokens, beside the projections of
            attention; None for plain projections.
        mlp_kernel_size: Of the depth-wise convolution of the MLP.
        block: Further arguments of :class:`~mmtoken.layers.common.swin.SwinBlock`.
    """

    mlp_type = StructuredMlp

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        *,
        side: int,
        attn_kernel_size: int | None,
        mlp_kernel_size: int,
        **block,
    ) -> None:
        linear = nn.Linear
        if attn_kernel_size is not None:
            linear = partial(StructuredLinear, side=side, kernel_size=attn_kernel_size)
        mlp = partial(StructuredMlp, kernel_size=mlp_kernel_size)
        super().__init__(embed_dims, num_heads, linear=linear, mlp=mlp, **block)

    def fits_tiles(self, x: Tensor) -> bool:
        return super().fits_tiles(x) and self.mlp.fits_strips()

    def projections(self) -> tuple[Callable[[Tensor], Tensor], ...]:
        """As in Swin, with weights that are computed once and not at each tile."""
        return tuple(map(fold, super().projections()))

    def forward_in_tiles(self, x: Tensor) -> Tensor:
        return self.mlp.add_in_strips(self.attend_in_tiles(x), self.norm2)


# ViT blocks that mix along the structure inside a token and along that of the token grid.


class StructuredAttention(nn.Module):
    """Multi-head self-attention of all tokens, with projections that see the planes inside them.

    Args:
        embed_dims: Channels of a token.
        num_heads: Attention heads.
        side: Side of the planes of a token, in cells.
        kernel_size: Of the convolutions inside the planes.
        qkv_bias: Biases for queries, keys and values.
    """

    def __init__(
        self, embed_dims: int, num_heads: int, side: int, kernel_size: int, qkv_bias: bool = True
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = StructuredLinear(embed_dims, 3 * embed_dims, side, kernel_size, qkv_bias)
        self.proj = StructuredLinear(embed_dims, embed_dims, side, kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, H, W, C) -> (B, H, W, C)``."""
        return self.proj(self.attend(self.qkv(x)))

    def attend(self, qkv: Tensor) -> Tensor:
        """``(B, H, W, 3 * C) -> (B, H, W, C)``."""
        grid = qkv.shape[1:3]
        heads = qkv.flatten(1, 2).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return join_heads(attention(*heads)).unflatten(1, grid)


class StructuredBlock(nn.Module):
    """Attention and MLP, each behind a LayerNorm and with a residual.

    Args:
        embed_dims: Channels of a token.
        num_heads: Attention heads.
        feedforward_channels: Hidden channels of the MLP.
        side: Side of the planes of a token, in cells.
        kernel_size: Of the convolutions inside the planes, in cells.
        mlp_kernel: Of the convolution of the token grid, in tokens.
        qkv_bias: Biases for queries, keys and values.
        drop_path: Stochastic depth rate.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        feedforward_channels: int,
        side: int = 8,
        kernel_size: int = 3,
        mlp_kernel: int = 5,
        qkv_bias: bool = True,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(embed_dims, NORM_EPS)
        self.attn = StructuredAttention(embed_dims, num_heads, side, kernel_size, qkv_bias)
        self.norm2 = nn.LayerNorm(embed_dims, NORM_EPS)
        self.mlp = StructuredMlp(embed_dims, feedforward_channels, mlp_kernel)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, H, W, C) -> (B, H, W, C)``."""
        known = type(self.mlp) is StructuredMlp and self.mlp.fits_strips()
        if known and use_tiling(x, self.training, self):
            return self.forward_in_tiles(x)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def forward_in_tiles(self, x: Tensor) -> Tensor:
        """:meth:`forward`, for inference, some tokens or a few rows of the grid at a time."""
        tile = partial(chunked_apply, training=self.training, layers=(self,))
        project, project_back = fold(self.attn.qkv), fold(self.attn.proj)
        attended = self.attn.attend(tile(lambda t: project(self.norm1(t)), x))
        x = tile(lambda t, a: t + project_back(a), x, attended)
        return self.mlp.add_in_strips(x, self.norm2)
