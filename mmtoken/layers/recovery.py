"""Dense maps from semantic tokens: the image tokens query them.

Source: STViT-R, arXiv 2303.08685, which recovers the image tokens of Swin's windows this way. For
plain ViT the paper only classifies; this is the same recovery with windows as large as the image.
"""

import torch.nn as nn
from torch import Tensor

from .cross_block import NORM_EPS, CrossBlock


class SemanticRecovery(CrossBlock):
    """Recover the image tokens from the semantic tokens of one tap.

    A block of a plain ViT, but for the keys, and a LayerNorm behind it. The image tokens are those
    that the semantic tokens were made of. By default there is no LayerScale, as in the blocks
    around it: the released recovery for Swin starts from 1e-5, which suits training on ImageNet
    with the recovery in place. Where it is added to a trained backbone it would at first hide the
    semantic tokens from the loss.

    Args:
        embed_dims: Channels.
        block: Arguments of :class:`~mmtoken.layers.cross_block.CrossBlock`.
    """

    def __init__(self, embed_dims: int, **block) -> None:
        super().__init__(embed_dims, **block)
        self.norm = nn.LayerNorm(embed_dims, NORM_EPS)

    def forward(self, image: Tensor, semantic: Tensor) -> Tensor:
        """``(B, H * W, C), (B, N, C) -> (B, H * W, C)``."""
        return self.norm(super().forward(image, semantic))
