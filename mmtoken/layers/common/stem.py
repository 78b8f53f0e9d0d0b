"""Pixels to stride-4 tokens."""

from collections import OrderedDict

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.fusion import fuse_conv_bn_weights

from .old_tiles import tokens_per_tile, use_tiling
from .plain import (
    all_plain,
    has_geometry,
    is_plain,
    is_plain_conv,
)


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
        x = pad_to_stride(x, self.stride)
        if use_tiling(x, self.training, self.proj) and self.can_be_folded():
            return self.forward_in_strips(x)
        return self.proj(x).permute(0, 2, 3, 1).contiguous()

    def can_be_folded(self) -> bool:
        """Whether the layers still are pairs of a convolution and a batch norm, and Hardswish.

        Tools that fuse batch norms, or exchange them for synchronised ones, leave others.
        """
        return (
            all(is_plain(self.proj[i], nn.Hardswish) for i in (1, 3))
            and all(is_plain_conv(self.proj[i].c, 3, stride=2, padding=1) for i in (0, 2))
            and all(is_plain(self.proj[i].bn, nn.BatchNorm2d) for i in (0, 2))
            and all(_has_statistics(self.proj[i].bn) for i in (0, 2))
        )

    def forward_in_strips(self, x: Tensor) -> Tensor:
        """The convolutions, for inference, a few rows of tokens at a time.

        ``(B, 3, H, W) -> (B, H / 4, W / 4, embed_dims)``, H and W multiples of 4. Batch norms are
        folded into the convolutions, and tokens come out channels last without a copy.
        """
        batch, _, height, width = x.shape
        rows, columns = height // self.stride, width // self.stride
        first, second = (_fold(layer) for layer in (self.proj[0], self.proj[2]))
        step = max(1, tokens_per_tile(self.proj[2].c.out_channels) // (batch * columns))
        out = []
        # One row of zeros above, the padding of both convolutions
        x = F.pad(x, (0, 0, 1, 0)).contiguous(memory_format=torch.channels_last)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            # Row r of the tokens sees rows 2r - 1 to 2r + 1 of the first convolution's output,
            # and its row m sees rows 2m - 1 to 2m + 1 of the image, which is shifted by 1.
            top = max(2 * start - 1, 0)
            y = F.conv2d(x[:, :, 2 * top : 4 * stop + 1], *first, stride=2, padding=(0, 1))
            y = F.pad(F.hardswish(y), (0, 0, int(start == 0), 0))
            y = F.hardswish(F.conv2d(y, *second, stride=2, padding=(0, 1)))
            out.append(y.permute(0, 2, 3, 1))
        return torch.cat(out, dim=1)


class PatchStem(nn.Module):
    """One convolution that takes whole patches, with a LayerNorm in Swin and PVT, without in ViT.

    Args:
        embed_dims: Channels of a token.
        in_channels: Channels of the image, or of the tokens that are merged.
        stride: Side of a patch, in pixels or in such tokens.
        norm: Whether there is a LayerNorm.

    Source: Swin Transformer, arXiv 2103.14030, PVT, arXiv 2102.12122, and ViT, arXiv 2010.11929;
    parameter names are the official ones, and timm's.
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
        x = pad_to_stride(x, self.stride)
        if x.is_contiguous() and is_plain_conv(self.proj, self.stride, self.stride):
            # An image: patches in a row give tokens with channels last, which a convolution of
            # NCHW does not, and the copy behind it costs more than the convolution.
            return self.norm(project(patchify(x, self.stride), self.proj))
        return self.norm(self.proj(x).permute(0, 2, 3, 1).contiguous())

    def embed_some(self, patches: Tensor) -> Tensor:
        """Some patches from :func:`patchify`: ``(m, C * stride**2) -> (m, embed_dims)``."""
        if all_plain(self) and is_plain_conv(self.proj, self.stride, self.stride):
            return self.norm(project(patches, self.proj))
        # Called as a module, each patch an image
        return self(patches.unflatten(1, (-1, self.stride, self.stride))).flatten(0, 2)

    def takes_patches_alone(self) -> bool:
        """Whether a token depends on its patch only, for :meth:`embed_some`, whoever watches.

        It need not if another layer stands in the place of one, such as patches that overlap.
        """
        return (
            type(self) is PatchStem
            and isinstance(self.proj, nn.Conv2d)
            and has_geometry(self.proj, self.stride, self.stride)
            and type(self.norm) in (nn.LayerNorm, nn.Identity)
        )


def patchify(x: Tensor, side: int) -> Tensor:
    """Cut images into patches, as :func:`project` takes them.

    ``(B, C, H, W) -> (B, ceil(H / side), ceil(W / side), C * side**2)``, padded with zeros.
    """
    x = pad_to_stride(x, side)
    return x.unflatten(2, (-1, side)).unflatten(4, (-1, side)).permute(0, 2, 4, 1, 3, 5).flatten(3)


def project(patches: Tensor, conv: nn.Conv2d) -> Tensor:
    """What a convolution makes of whole patches: ``(..., C * side**2) -> (..., embed_dims)``.

    It reads the weights, so the layer must be plain (:func:`~mmtoken.layers.common.plain.is_plain_conv`).
    """
    return F.linear(patches, conv.weight.flatten(1), conv.bias)


def pad_to_stride(x: Tensor, stride: int) -> Tensor:
    """Zero-pad images ``(B, C, H, W)`` at the bottom and right to multiples of ``stride``."""
    height, width = x.shape[-2:]
    return F.pad(x, (0, -width % stride, 0, -height % stride))


def _has_statistics(norm: nn.BatchNorm2d) -> bool:
    return not norm.training and norm.running_mean is not None and norm.running_var is not None


def _fold(layer: nn.Sequential) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution that does what convolution and batch norm do."""
    norm = layer.bn
    weight, bias = fuse_conv_bn_weights(
        layer.c.weight, layer.c.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight,
        norm.bias,
    )  # fmt: skip
    return weight.contiguous(memory_format=torch.channels_last), bias


def _conv_norm(in_channels: int, out_channels: int) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1, bias=False)
    return nn.Sequential(OrderedDict(c=conv, bn=nn.BatchNorm2d(out_channels)))
