"""Swin blocks on structure-aware tokens.

Source: SWAT, arXiv 2111.13677, section 3.3; released code, github.com/kkahatapitiya/SWAT (MIT).
"""

from collections.abc import Callable
from functools import partial

import torch.nn as nn
from torch import Tensor

from ..tokens.plain import known_to_fast_paths
from .structured import StructuredLinear, StructuredMlp, fold
from .swin import SwinBlock


@known_to_fast_paths
class StructuredSwinBlock(SwinBlock):
    """A Swin block that mixes channels along the planes of a token, and tokens along the grid.

    Args:
        embed_dims: Channels.
        num_heads: Attention heads.
        side: Side of the planes of a token, in cells.
        attn_kernel_size: Of the convolutions inside the tokens, beside the projections of
            attention; None for plain projections.
        mlp_kernel_size: Of the depth-wise convolution of the MLP.
        block: Further arguments of :class:`~mmtoken.layers.swin.SwinBlock`.
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
