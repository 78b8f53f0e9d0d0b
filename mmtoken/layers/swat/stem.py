"""Pixels to tokens that keep their spatial structure.

Source: SWAT, arXiv 2111.13677, section 3.1; released code, github.com/kkahatapitiya/SWAT (MIT).
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor

from ...runtime.reference import on_reference_path
from ..common.old_tiles import tokens_per_tile, use_tiling
from ..common.plain import all_plain, is_plain_conv
from ..common.stem import pad_to_stride
from .planes import fold_planes

STRIDE = 2  # of the first convolution


class StructuredStem(nn.Module):
    """Two convolutions to a few planes at a fine stride, folded to tokens.

    Args:
        embed_dims: Channels of a token, a multiple of ``side**2``.
        patch_size: Side of a patch, in pixels, a multiple of ``2 * side``.
        side: Side of a plane of a token, in cells.
        kernel_size: Of the first convolution, whose stride is 2: 2, or 4 with padding. The second
            one takes whole patches.
        in_channels: Channels of the image.
        hidden_dims: Channels between the convolutions.
        norm: Normalise the hidden channels, and the tokens, as SWAT on Swin does.
        position: Learn an embedding of the position inside a token, as SWAT on ViT does. It is laid
            over the whole image, so its period is a token.
    """

    def __init__(
        self,
        embed_dims: int,
        patch_size: int,
        side: int,
        kernel_size: int,
        in_channels: int = 3,
        hidden_dims: int = 128,
        norm: bool = False,
        position: bool = False,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.side = side
        self.cell_size = patch_size // side // STRIDE  # in hidden pixels
        self.kernel_size = kernel_size
        self.conv1 = nn.Conv2d(
            in_channels, hidden_dims, kernel_size, STRIDE, padding=kernel_size // 2 - 1
        )
        self.plane_pos = None
        if position:
            period = patch_size // STRIDE
            position = torch.empty(1, hidden_dims, period, period)
            self.plane_pos = nn.Parameter(trunc_normal_(position, std=0.02))
        self.norm1 = nn.LayerNorm(hidden_dims) if norm else nn.Identity()
        self.conv2 = nn.Conv2d(
            hidden_dims, embed_dims // side**2, self.cell_size, stride=self.cell_size
        )
        self.norm2 = nn.LayerNorm(embed_dims) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """``(B, in_channels, H, W) -> (B, ceil(H / p), ceil(W / p), C)``, p being the patch size.

        Images are padded with zeros at the bottom and right to whole patches.
        """
        x = pad_to_stride(x, self.patch_size)
        if on_reference_path() or not self.can_be_flattened():
            return self.forward_reference(x)
        windows = self.hidden_windows(x)
        weights = self.flat_weights()
        if not use_tiling(x, self.training):
            return self.embed(windows, *weights)
        out = x.new_empty(*windows.shape[:3], len(weights[-1]) * self.side**2)
        length = max(1, tokens_per_tile(len(weights[0])) // len(weights[1]))
        for tile, target in zip(_tiles(windows, length), _tiles(out, length), strict=True):
            target.copy_(self.embed(tile, *weights))
        return out

    def can_be_flattened(self) -> bool:
        """Whether :meth:`embed` may stand for the layers unnoticed."""
        padding = self.kernel_size // 2 - 1
        return (
            all_plain(self)
            and is_plain_conv(self.conv1, self.kernel_size, STRIDE, padding)
            and is_plain_conv(self.conv2, self.cell_size, self.cell_size)
            and self.conv1.bias is not None
        )

    def forward_reference(self, x: Tensor) -> Tensor:
        """:meth:`forward` of whole patches, as the paper says it."""
        x = self.conv1(x)
        if self.plane_pos is not None:
            rows, columns = (n // self.plane_pos.shape[-1] for n in x.shape[2:])
            x = x + self.plane_pos.repeat(1, 1, rows, columns)
        x = self.norm1(F.gelu(x).permute(0, 2, 3, 1))
        x = self.conv2(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.norm2(fold_planes(x, 1, self.side))

    def embed(self, windows: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor) -> Tensor:
        """Tokens of what their hidden pixels see.

        Hidden pixels of a token stand together, cell by cell, so both convolutions are Linear
        layers, and folding is a transposition inside each token.

        Args:
            windows: ``(..., side, side, n, n, m, m, 4 * in_channels)``, see :meth:`hidden_windows`.
            weight1, bias1, weight2: From :meth:`flat_weights`.

        Returns:
            ``(..., C)``.
        """
        t = F.linear(windows.reshape(-1, len(bias1), weight1.shape[1]), weight1)
        t = self.norm1(F.gelu(t.add_(bias1)))
        t = F.linear(t.view(len(t), self.side**2, -1), weight2, self.conv2.bias)
        return self.norm2(t.transpose(1, 2).reshape(*windows.shape[:-7], -1))

    def hidden_windows(self, x: Tensor) -> Tensor:
        """What the first convolution sees for each hidden pixel of each token.

        ``(B, in_channels, H, W)`` to ``(B, H / p, W / p, side, side, n, n, m, m, 4 * in_channels)``
        where cells have n x n hidden pixels. Windows are m x m patches of 2 x 2 pixels; where they
        overlap, they share memory.
        """
        pixels = pad_to_stride(F.pad(x, self.conv1.padding * 2), STRIDE)
        patches = F.pixel_unshuffle(pixels, STRIDE).permute(0, 2, 3, 1)
        size = self.conv1.kernel_size[0] // STRIDE
        windows = patches.unfold(1, size, 1).unfold(2, size, 1)
        return self._by_token(windows.movedim(3, -1))

    def flat_weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """The convolutions as Linear layers.

        Returns:
            The first weight, ``(hidden_dims, m * m * 4 * in_channels)`` of a window; its bias with
            the position, ``(hidden pixels of a token, hidden_dims)``; the second weight,
            ``(planes, n * n * hidden_dims)`` of a cell.
        """
        weight = self.conv1.weight.unflatten(3, (-1, STRIDE)).unflatten(2, (-1, STRIDE))
        weight1 = weight.permute(0, 2, 4, 1, 3, 5).flatten(1)
        bias1 = self.conv1.bias.expand((self.side * self.cell_size) ** 2, -1)
        if self.plane_pos is not None:
            position = self._by_token(self.plane_pos.permute(0, 2, 3, 1))
            bias1 = bias1 + position.reshape(bias1.shape)
        return weight1, bias1, self.conv2.weight.permute(0, 2, 3, 1).flatten(1)

    def _by_token(self, pixels: Tensor) -> Tensor:
        """``(B, H, W, ...) -> (B, H', W', side, side, n, n, ...)``, tokens of cells of pixels."""
        parts = (-1, self.side, self.cell_size)
        pixels = pixels.unflatten(2, parts).unflatten(1, parts)
        return pixels.permute(0, 1, 4, 2, 5, 3, 6, *range(7, pixels.ndim))


def _tiles(x: Tensor, length: int) -> list[Tensor]:
    """Cut grids ``(B, H, W, ...)`` into tiles of at most ``length`` tokens, rows if they fit."""
    rows = max(1, length // x.shape[2])
    return [
        tile for image in x for strip in image.split(rows) for tile in strip.split(length, dim=1)
    ]
