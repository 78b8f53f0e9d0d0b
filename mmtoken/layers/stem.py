"""Convolutional patch embedding."""

from collections import OrderedDict

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


class ConvStem(nn.Module):
    """Two strided convolutions, each with batch norm and Hardswish: pixels to stride-4 tokens.

    Args:
        embed_dims: Channels of a token.
        in_channels: Channels of the image.

    Source: released code of STViT-R, ``patch_embed`` (MIT); parameter names are the official ones.
    """

    stride = 4

    def __init__(self, embed_dims: int, in_channels: int = 3) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            _conv_norm(in_channels, embed_dims // 2),
            nn.Hardswish(),
            _conv_norm(embed_dims // 2, embed_dims),
            nn.Hardswish(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """``(B, 3, H, W) -> (B, ceil(H / 4), ceil(W / 4), embed_dims)``."""
        height, width = x.shape[-2:]
        x = F.pad(x, (0, -width % self.stride, 0, -height % self.stride))
        return self.proj(x).permute(0, 2, 3, 1).contiguous()


def _conv_norm(in_channels: int, out_channels: int) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1, bias=False)
    return nn.Sequential(OrderedDict(c=conv, bn=nn.BatchNorm2d(out_channels)))
