"""SWAT in tiles and strips: the convolutions of its stem and MLPs take a few rows at a time."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..layers.common.plain import is_plain_conv
from ..layers.common.stem import pad_to_stride
from ..layers.common.vit import AttentionFn, full_attention
from ..layers.swat.structured import (
    STRIDE,
    StructuredBlock,
    StructuredLinear,
    StructuredMlp,
    StructuredStem,
    StructuredSwinBlock,
    record_cells,
)
from .swin import Projection, attend_in_tiles
from .tiling import chunked_apply, tiled, tokens_per_tile, use_tiling


@tiled
class TiledStructuredStem(StructuredStem):
    """:class:`~mmtoken.layers.swat.structured.StructuredStem` for CPU inference."""

    def forward(self, x: Tensor) -> Tensor:
        conv, (size, _) = self.conv1, self.conv1.kernel_size
        pad = size // 2 - 1
        if not (use_tiling(self, x) and is_plain_conv(conv, size, STRIDE, pad)):
            return super().forward(x)
        x = pad_to_stride(x, self.patch_size).contiguous(memory_format=torch.channels_last)
        batch, _, height, width = x.shape
        hidden = (
            batch * (width // STRIDE) * (self.patch_size // STRIDE)
        )  # pixels in a row of tokens
        step = self.patch_size * max(1, 8 * tokens_per_tile(conv.out_channels) // hidden)
        x = F.pad(x, (0, 0, pad, pad))
        strips = []
        for top in range(0, height, step):
            rows = x[:, :, top : min(top + step, height) + 2 * pad]
            rows = F.conv2d(rows, conv.weight, conv.bias, STRIDE, padding=(0, pad))
            strips.append(self.to_tokens(rows))
        return record_cells(torch.cat(strips, dim=1), self.side)


@tiled
class TiledStructuredSwinBlock(StructuredSwinBlock):
    """:class:`~mmtoken.layers.swat.structured.StructuredSwinBlock` for CPU inference."""

    def forward(self, x: Tensor) -> Tensor:
        if not (fits_strips(self.mlp) and use_tiling(self, x)):
            return super().forward(x)
        x = attend_in_tiles(self, x, fold(self.attn.qkv), fold(self.attn.proj))
        return add_mlp_in_strips(x, self.norm2, self.mlp)


@tiled
class TiledStructuredBlock(StructuredBlock):
    """:class:`~mmtoken.layers.swat.structured.StructuredBlock` for CPU inference."""

    def forward(
        self,
        x: Tensor,
        attn_fn: AttentionFn = full_attention,
        lengths: list[int] | None = None,
    ) -> Tensor:
        if not (fits_strips(self.mlp) and use_tiling(self, x)):
            return super().forward(x, attn_fn, lengths)
        qkv, proj = fold(self.attn.qkv), fold(self.attn.proj)
        attended = self.attn.attend(chunked_apply(lambda t: qkv(self.norm1(t)), x), attn_fn)
        x = chunked_apply(lambda t, a: t + proj(a), x, attended)
        return add_mlp_in_strips(x, self.norm2, self.mlp)


def fold(layer: nn.Module) -> Projection:
    """A projection whose weight is computed once, see ``StructuredLinear.fold``."""
    return layer.fold() if isinstance(layer, StructuredLinear) else layer


def fits_strips(mlp: nn.Module) -> bool:
    """Whether :func:`add_mlp_in_strips` knows the MLP and its convolution."""
    return type(mlp) is StructuredMlp and is_plain_conv(
        mlp.dwconv, mlp.kernel_size, padding=mlp.kernel_size // 2, groups=mlp.hidden_dims
    )


def add_mlp_in_strips(x: Tensor, norm: nn.Module, mlp: StructuredMlp) -> Tensor:
    """``x + mlp(norm(x))``, a few rows of tokens at a time.

    The hidden rows that the next strip needs too are kept.

    Args:
        x: ``(B, H, W, C)``; it is overwritten.
        norm: Normalizes each token.
        mlp: See :func:`fits_strips`.

    Returns:
        ``x``.
    """
    _, height, width, channels = x.shape
    length = tokens_per_tile(channels)
    if height * width <= length:
        for images in x.split(length // (height * width)):
            images += mlp(norm(images))
        return x
    halo = mlp.kernel_size // 2
    rows = max(1, 2 * halo, length // width)
    for image in x:
        # Row r of the hidden ones is row start - halo + r of the grid, zero outside of it.
        hidden = mlp.fc1(image[:0]).new_zeros(rows + 2 * halo, width, mlp.hidden_dims)
        for start in range(0, height, rows):
            stop = min(start + rows, height)
            if start:
                hidden[: 2 * halo] = hidden[rows:]
            new = image[start + halo if start else 0 : stop + halo]
            first = 2 * halo if start else halo
            last = first + len(new)
            hidden[first:last] = gelu_(mlp.fc1(norm(new)))
            hidden[last:] = 0
            image[start:stop] += _convolve(mlp, hidden[: stop - start + 2 * halo])
    return x


def _convolve(mlp: StructuredMlp, hidden: Tensor) -> Tensor:
    """The second half of the MLP, without padding: ``(H + k - 1, W, hidden) -> (H, W, C)``."""
    conv, halo = mlp.dwconv, mlp.kernel_size // 2
    # Channels last, where ``hidden.permute(2, 0, 1)[None]`` would be copied
    x = hidden[None].permute(0, 3, 1, 2)
    x = F.conv2d(x, conv.weight, conv.bias, padding=(0, halo), groups=conv.groups)
    return mlp.fc2(gelu_(x.permute(0, 2, 3, 1)))[0]


def gelu_(x: Tensor) -> Tensor:
    """GELU in place, which torch has no public name for."""
    return torch.ops.aten.gelu_(x)
