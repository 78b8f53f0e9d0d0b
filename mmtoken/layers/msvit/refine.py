"""A small convolution on maps of mixed scale.

It is our own; maps of mixed scale are from MSViT, arXiv 2307.02321.
"""

import torch.nn as nn
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor


class CoarseRefine(nn.Module):
    """Refine a map in which coarse tokens stand in all places of their regions.

    The places of a coarse region are equal until they look around: a depth-wise 3 x 3 convolution,
    GELU and a projection, added to the map. The convolution also reads where the map is coarse,
    anew for every channel, so that the GELU can close a channel wherever the map is fine. One
    such flag beside the channels, mixed only by the projection, would add the same to whatever the
    map holds. LayerNorm comes first, so that the flag counts as much behind every block of the
    backbone.

    Per place it costs ``C * C`` multiplications and a few, a twelfth of a block of ViT.

    Args:
        channels: Of the map, C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = LayerNorm2d(channels)
        self.look = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.flag = nn.Conv2d(1, channels, 3, padding=1, bias=False)
        self.proj = nn.Conv2d(channels, channels, 1)
        self.init_weights()

    def init_weights(self) -> None:
        """Start as the identity."""
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def forward(self, x: Tensor, coarse: Tensor) -> Tensor:
        """Refine a map.

        Args:
            x: ``(B, C, H, W)``.
            coarse: 1 where it is coarse and 0 elsewhere, ``(B, 1, H, W)``.

        Returns:
            ``(B, C, H, W)``.
        """
        return x + self.proj(F.gelu(self.look(self.norm(x)) + self.flag(coarse)))
