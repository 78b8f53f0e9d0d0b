"""Patch embeddings: pixels to tokens."""

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
        """``(B, in_channels, H, W) -> (B, ceil(H / 4), ceil(W / 4), embed_dims)``."""
        x = self.proj(pad_to_stride(x, self.stride))
        return x.permute(0, 2, 3, 1).contiguous()


class PatchEmbed(nn.Module):
    """One convolution that takes whole patches, with a LayerNorm in Swin and PVT, without in ViT.

    Args:
        embed_dims: Channels of a token.
        in_channels: Channels of the image, or of the tokens that are merged.
        stride: Side of a patch, in pixels or in such tokens.
        norm: Whether there is a LayerNorm.

    Source: Swin Transformer, arXiv 2103.14030, PVT, arXiv 2102.12122, and ViT, arXiv 2010.11929;
    parameter names are the official ones, and timm's.

    Example:
        >>> import torch
        >>> PatchEmbed(embed_dims=32, stride=4)(torch.zeros(1, 3, 30, 64)).shape
        torch.Size([1, 8, 16, 32])
    """

    def __init__(
        self, embed_dims: int, in_channels: int = 3, stride: int = 4, norm: bool = True
    ) -> None:
        super().__init__()
        self.stride = stride
        self.proj = nn.Conv2d(in_channels, embed_dims, stride, stride)
        self.norm = nn.LayerNorm(embed_dims) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """``(B, in_channels, H, W) -> (B, ceil(H / stride), ceil(W / stride), embed_dims)``."""
        x = self.proj(pad_to_stride(x, self.stride))
        return self.norm(x.permute(0, 2, 3, 1).contiguous())


def pad_to_stride(x: Tensor, stride: int) -> Tensor:
    """Zero-pad images ``(B, C, H, W)`` at the bottom and right to multiples of ``stride``."""
    height, width = x.shape[-2:]
    return F.pad(x, (0, -width % stride, 0, -height % stride))


def _conv_norm(in_channels: int, out_channels: int) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1, bias=False)
    return nn.Sequential(OrderedDict(c=conv, bn=nn.BatchNorm2d(out_channels)))
