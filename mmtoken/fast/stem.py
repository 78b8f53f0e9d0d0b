"""The convolutional stem, a few rows of tokens at a time."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ..layers.common.plain import is_plain, is_plain_conv
from ..layers.common.stem import ConvStem, pad_to_stride
from .tiling import tiled, tokens_per_tile, use_tiling


@tiled
class TiledConvStem(ConvStem):
    """:class:`~mmtoken.layers.common.stem.ConvStem` for CPU inference.

    Batch norms are folded into the convolutions, and tokens come out channels last without a copy.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not use_tiling(self, x) or not self.can_be_folded():
            return super().forward(x)
        x = pad_to_stride(x, self.stride)
        batch, _, height, width = x.shape
        rows, columns = height // self.stride, width // self.stride
        first, second = _fold(self.proj[0]), _fold(self.proj[2])
        step = max(1, tokens_per_tile(len(second[1])) // (batch * columns))
        strips = []
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
            strips.append(y.permute(0, 2, 3, 1))  # (B, stop - start, W / 4, C)
        return torch.cat(strips, dim=1)

    def can_be_folded(self) -> bool:
        """Whether the layers are still convolutions with batch norms, and Hardswish between them.

        Tools that fuse batch norms, or exchange them for synchronized ones, leave others.
        """
        return (
            all(is_plain(self.proj[i], nn.Hardswish) for i in (1, 3))
            and all(is_plain_conv(self.proj[i].c, 3, stride=2, padding=1) for i in (0, 2))
            and all(_has_statistics(self.proj[i].bn) for i in (0, 2))
        )


def _has_statistics(norm: nn.Module) -> bool:
    plain = is_plain(norm, nn.BatchNorm2d) and not norm.training
    return plain and norm.running_mean is not None and norm.running_var is not None


def _fold(layer: nn.Sequential) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution that equals a convolution and its batch norm."""
    conv, norm = layer.c, layer.bn
    statistics = norm.running_mean, norm.running_var, norm.eps
    weight, bias = fuse_conv_bn_weights(conv.weight, conv.bias, *statistics, norm.weight, norm.bias)
    return weight.contiguous(memory_format=torch.channels_last), bias
