"""Layers that mix channels along the structure inside a token, and tokens along that of the image.

Source: SWAT, arXiv 2111.13677, sections 3.2 and 3.3; released code, github.com/kkahatapitiya/SWAT
(MIT).
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ...runtime.reference import on_reference_path
from ..common.cache import cache_by_shape
from ..common.old_tiles import tokens_per_tile, use_tiling
from ..common.plain import is_plain, is_plain_conv
from .planes import fold_planes, unfold_planes


class StructuredLinear(nn.Module):
    """The mean of a Linear layer and of a convolution inside the planes of each token.

    Both are linear maps of the same channels, so together they are one: ``weight`` and ``bias`` are
    those of the Linear layer that does the same. They are differentiable, and computing them costs
    as much as a window of tokens does, so training takes this path too; the plain form is
    :meth:`forward_reference`, which also serves where somebody has replaced or watches a part.

    Args:
        embed_dims: Channels of a token, ``planes * side**2``.
        out_dims: Output channels, a multiple of ``side**2``.
        side: Side of a plane, in cells.
        kernel_size: Of the convolution, odd.
        bias: Whether both have biases.
    """

    def __init__(
        self, embed_dims: int, out_dims: int, side: int, kernel_size: int, bias: bool = True
    ) -> None:
        super().__init__()
        planes, out_planes = embed_dims // side**2, out_dims // side**2
        self.side = side
        self.planes = planes
        self.kernel_size = kernel_size
        self.linear = nn.Linear(embed_dims, out_dims, bias=bias)
        self.conv = nn.Conv2d(planes, out_planes, kernel_size, padding=kernel_size // 2, bias=bias)

    @property
    def weight(self) -> Tensor:
        """``(out_dims, embed_dims)``."""
        kernel = self.conv.weight
        places = cell_offsets(self.side, kernel.shape[-1], kernel.device, kernel.dtype)
        inside = torch.einsum('oik,kpq->opiq', kernel.flatten(2), places)
        return (self.linear.weight + inside.reshape(self.linear.weight.shape)) / 2

    @property
    def bias(self) -> Tensor | None:
        """``(out_dims,)``, or None."""
        if self.linear.bias is None:
            return None
        return (self.linear.bias + self.conv.bias.repeat_interleave(self.side**2)) / 2

    def forward(self, x: Tensor) -> Tensor:
        """``(..., embed_dims) -> (..., out_dims)``."""
        return self.fold()(x)

    def fold(self) -> Callable[[Tensor], Tensor]:
        """:meth:`forward` as a function whose weight is computed now, and not at each call."""
        if on_reference_path() or not self.can_be_folded():
            return self.forward_reference
        return partial(F.linear, weight=self.weight, bias=self.bias)

    def can_be_folded(self) -> bool:
        """Whether ``weight`` and ``bias`` do what the two layers do."""
        linear, conv = self.linear, self.conv
        return (
            is_plain(linear, nn.Linear)
            and is_plain_conv(conv, self.kernel_size, padding=self.kernel_size // 2)
            and (linear.bias is None) == (conv.bias is None)
        )

    def forward_reference(self, x: Tensor) -> Tensor:
        """:meth:`forward`, as the paper says it."""
        planes = x.reshape(-1, self.planes, self.side, self.side)
        inside = self.conv(planes).flatten(1).view(*x.shape[:-1], -1)
        return (self.linear(x) + inside) / 2


def fold(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    """A projection as a function to call often; see :meth:`StructuredLinear.fold`."""
    return layer.fold() if isinstance(layer, StructuredLinear) else layer


@cache_by_shape
def cell_offsets(side: int, kernel_size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Which weight of a kernel leads from a cell of a plane to another.

    Returns:
        ``(kernel_size**2, side**2, side**2)``: 1 where the weight, row by row, is that between the
        output cell and the input cell, else 0.
    """
    cell = torch.arange(side)
    offset = cell[None, :] - cell[:, None] + kernel_size // 2  # (output, input)
    along = (offset[None] == torch.arange(kernel_size)[:, None, None]).to(dtype)
    # (kernel row, kernel column, output row, output column, input row, input column)
    places = along[:, None, :, None, :, None] * along[None, :, None, :, None, :]
    return places.reshape(kernel_size**2, side**2, side**2).to(device)


class StructuredMlp(nn.Module):
    """An MLP with a depth-wise convolution of the token grid between its layers.

    Args:
        embed_dims: Channels.
        hidden_dims: Hidden channels.
        kernel_size: Of the convolution, odd, in tokens.
    """

    def __init__(self, embed_dims: int, hidden_dims: int, kernel_size: int) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.hidden_dims = hidden_dims
        self.fc1 = nn.Linear(embed_dims, hidden_dims)
        self.dwconv = nn.Conv2d(
            hidden_dims, hidden_dims, kernel_size, padding=kernel_size // 2, groups=hidden_dims
        )
        self.fc2 = nn.Linear(hidden_dims, embed_dims)

    def init_weights(self) -> None:
        """As torch starts convolutions, which both layers are in the release."""
        self.fc1.reset_parameters()
        self.fc2.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """``(B, H, W, C) -> (B, H, W, C)``."""
        x = F.gelu(self.fc1(x))
        x = F.gelu(self.dwconv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        return self.fc2(x)

    def fits_strips(self) -> bool:
        """Whether :meth:`add_in_strips` knows the convolution."""
        return is_plain_conv(
            self.dwconv, self.kernel_size, padding=self.kernel_size // 2, groups=self.hidden_dims
        )

    def add_in_strips(self, x: Tensor, norm: nn.Module) -> Tensor:
        """``x + self(norm(x))``, for inference, a few rows of tokens at a time.

        The hidden rows that the next strip needs too are kept.

        Args:
            x: ``(B, H, W, C)``; it is overwritten.
            norm: Applied token by token.

        Returns:
            ``x``.
        """
        _, height, width, channels = x.shape
        length = tokens_per_tile(channels)
        if height * width <= length:
            for group in x.split(length // (height * width)):
                group += self(norm(group))
            return x
        halo = self.dwconv.padding[0]
        rows = max(1, 2 * halo, length // width)
        for image in x:
            # Row r of the hidden ones is row start - halo + r of the grid, zero outside of it.
            hidden = self.fc1(image[:0]).new_zeros(rows + 2 * halo, width, self.hidden_dims)
            for start in range(0, height, rows):
                stop = min(start + rows, height)
                if start:
                    hidden[: 2 * halo] = hidden[rows:]
                new = image[start + halo if start else 0 : stop + halo]
                first = 2 * halo if start else halo
                last = first + len(new)
                # Into whole rows of one image: to strided memory it writes wrong numbers in fp32.
                torch.ops.aten.gelu.out(self.fc1(norm(new)), out=hidden[first:last])
                hidden[last:] = 0
                image[start:stop] += self.reduce(hidden[: stop - start + 2 * halo])
        return x

    def reduce(self, hidden: Tensor) -> Tensor:
        """Hidden rows to those that lie in their midst: ``(H + k - 1, W, hidden) -> (H, W, C)``."""
        x = F.conv2d(
            # Channels-last, where ``hidden.permute(2, 0, 1)[None]`` would be copied.
            hidden[None].permute(0, 3, 1, 2),
            self.dwconv.weight,
            self.dwconv.bias,
            padding=(0, self.dwconv.padding[1]),
            groups=self.dwconv.groups,
        )
        return self.fc2(torch.ops.aten.gelu_(x.permute(0, 2, 3, 1)))[0]


class StructuredMerging(nn.Module):
    """Convolve the planes of all tokens as one map, and fold them to half the grid.

    Args:
        embed_dims: Channels of a token.
        side: Side of its planes, in cells.
        kernel_size: Of the convolution, odd, in cells.
    """

    def __init__(self, embed_dims: int, side: int, kernel_size: int) -> None:
        super().__init__()
        planes = embed_dims // side**2
        self.side = side
        self.kernel_size = kernel_size
        self.norm = nn.LayerNorm(planes)
        self.reduction = nn.Conv2d(
            planes, planes // 2, kernel_size, padding=kernel_size // 2, bias=False
        )

    def forward(self, x: Tensor) -> Tensor:
        """``(B, H, W, C) -> (B, ceil(H / 2), ceil(W / 2), 2 * C)``."""
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        if use_tiling(x, self.training, self) and self.fits_strips():
            return self.forward_in_strips(x)
        pixels = self.norm(unfold_planes(x, self.side, self.side))
        return self.fold(self.reduction(pixels.permute(0, 3, 1, 2)))

    def fits_strips(self) -> bool:
        """Whether :meth:`forward_in_strips` knows the convolution."""
        return is_plain_conv(self.reduction, self.kernel_size, padding=self.kernel_size // 2)

    def fold(self, pixels: Tensor) -> Tensor:
        """Convolved cells to tokens: ``(B, planes / 2, rows, columns) -> (B, H, W, C)``."""
        return fold_planes(pixels.permute(0, 2, 3, 1), 1, 2 * self.side)

    def forward_in_strips(self, x: Tensor) -> Tensor:
        """:meth:`forward`, for inference, of a grid with even sides, a few rows at a time."""
        batch, height, width, channels = x.shape
        reach = self.reduction.padding[0]  # of the convolution, in cells
        halo = -(-reach // self.side)  # in tokens
        # As many numbers as the hidden tokens that an MLP has in a tile
        rows = 2 * max(1, 2 * tokens_per_tile(channels) // (batch * width))
        out = []
        for start in range(0, height, rows):
            stop = min(start + rows, height)
            top, bottom = max(start - halo, 0), min(stop + halo, height)
            pixels = self.norm(unfold_planes(x[:, top:bottom], self.side, self.side))
            # Zeros outside of the grid; inside, whole tokens are cropped to what is in reach.
            above, below = (reach - n * self.side for n in (start - top, bottom - stop))
            pixels = F.pad(pixels, (0, 0, 0, 0, above, below)).permute(0, 3, 1, 2)
            out.append(self.fold(F.conv2d(pixels, self.reduction.weight, padding=(0, reach))))
        return torch.cat(out, dim=1)
