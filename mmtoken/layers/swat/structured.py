"""Layers and blocks on structure-aware tokens: stem, projections, MLP, merging.

They mix channels along the structure inside a token, and tokens along that of the image.

Source: SWAT, arXiv 2111.13677, section 3; released code, github.com/kkahatapitiya/SWAT (MIT).
Parameter names are timm's where timm has the layer.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor

from ...runtime.decisions import record_rectangles
from ...runtime.reference import on_reference_path
from ..common.cache import cache_by_shape
from ..common.plain import is_plain, is_plain_conv
from ..common.stem import pad_to_stride
from ..common.swin import SwinBlock
from ..common.vit import Attention, AttentionFn, ViTBlock
from .depthwise import depthwise_conv
from .planes import fold_planes, unfold_planes

STRIDE = 2  # of the stem's first convolution


class StructuredStem(nn.Module):
    """Two convolutions to a few planes at a fine stride, folded to tokens.

    Args:
        embed_dims: Channels of a token, a multiple of ``side**2``.
        patch_size: Side of a patch, in pixels, a multiple of ``2 * side``.
        side: Side of a plane of a token, in cells.
        kernel_size: Of the first convolution, whose stride is 2: 2, or 4 with padding. The second
            one takes whole cells.
        in_channels: Channels of the image.
        hidden_dims: Channels between the convolutions.
        norm: Normalize the hidden channels, and the tokens, as SWAT on Swin does.
        position: Learn an embedding of the position inside a token, as SWAT on ViT does. It is
            repeated over the whole image, so its period is a token.

    Example:
        >>> stem = StructuredStem(embed_dims=32, patch_size=8, side=4, kernel_size=2)
        >>> stem(torch.zeros(1, 3, 32, 44)).shape
        torch.Size([1, 4, 6, 32])
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
        cell_size = patch_size // side // STRIDE  # in hidden pixels
        self.conv1 = nn.Conv2d(
            in_channels, hidden_dims, kernel_size, STRIDE, padding=kernel_size // 2 - 1
        )
        self.plane_pos = None
        if position:
            position = torch.empty(1, hidden_dims, patch_size // STRIDE, patch_size // STRIDE)
            self.plane_pos = nn.Parameter(trunc_normal_(position, std=0.02))
        self.norm1 = nn.LayerNorm(hidden_dims) if norm else nn.Identity()
        self.conv2 = nn.Conv2d(hidden_dims, embed_dims // side**2, cell_size, stride=cell_size)
        self.norm2 = nn.LayerNorm(embed_dims) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """``(B, in_channels, H, W) -> (B, ceil(H / p), ceil(W / p), C)``, p being the patch size.

        Images are padded with zeros at the bottom and right to whole patches.
        """
        x = pad_to_stride(x, self.patch_size)
        # Hidden pixels with channels last, which the norm and the planes need
        x = self.to_tokens(self.conv1(x.contiguous(memory_format=torch.channels_last)))
        return record_cells(x, self.side)

    def to_tokens(self, x: Tensor) -> Tensor:
        """Hidden pixels to tokens: ``(B, hidden_dims, H / 2, W / 2) -> (B, H / p, W / p, C)``."""
        if self.plane_pos is not None:
            period = self.plane_pos.shape[-1]
            x = x.unflatten(3, (-1, period)).unflatten(2, (-1, period))
            x = (x + self.plane_pos[:, :, None, :, None]).flatten(4).flatten(2, 3)
        x = self.norm1(F.gelu(x).permute(0, 2, 3, 1))
        cells = self.conv2(x.permute(0, 3, 1, 2))  # (B, planes, rows, columns)
        return self.norm2(fold_planes(cells.permute(0, 2, 3, 1), 1, self.side))


def record_cells(x: Tensor, side: int) -> Tensor:
    """Record tokens with planes of ``side * side`` cells, ``(B, H, W, C)``, and return them."""
    name = f'{side} x {side} cells in a token'
    record_rectangles(name, x.shape[0], tuple(x.shape[1:3]), cells=side)
    return x


def check_planes(embed_dims: int, patch_size: int, plane_size: int) -> None:
    """Refuse sizes that structure-aware tokens cannot have.

    Args:
        embed_dims: Channels of a token.
        patch_size: Side of a patch, in pixels.
        plane_size: Side of a plane of a token, in cells.

    Raises:
        ValueError: The message says what is allowed.
    """
    if plane_size < 1:
        raise ValueError(f'plane_size must be at least 1, got {plane_size}')
    if embed_dims % plane_size**2:
        raise ValueError(
            f'embed_dims must be a multiple of plane_size**2 = {plane_size**2}, got {embed_dims}'
        )
    if patch_size < 1 or patch_size % (STRIDE * plane_size):
        raise ValueError(
            f'patch_size must be a multiple of {STRIDE} * plane_size = {STRIDE * plane_size}, '
            f'got {patch_size}'
        )


class StructuredLinear(nn.Module):
    """The mean of a Linear layer and of a convolution inside the planes of each token.

    Both are linear maps of the same channels, so together they are one Linear layer. Its weight is
    differentiable and computing it costs as much as a window of tokens does, so training does so
    too. The plain form is :meth:`forward_reference`, which also serves where somebody has replaced
    or watches a part.

    Args:
        embed_dims: Channels of a token, ``planes * side**2``.
        out_dims: Output channels, a multiple of ``side**2``.
        side: Side of a plane, in cells.
        kernel_size: Of the convolution, odd.
        bias: Whether both have biases.

    Example:
        >>> layer = StructuredLinear(32, 64, side=4, kernel_size=3)
        >>> x = torch.randn(5, 32)
        >>> torch.allclose(layer(x), layer.forward_reference(x), atol=1e-5)
        True
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

    def forward(self, x: Tensor) -> Tensor:
        """``(..., embed_dims) -> (..., out_dims)``."""
        return self.fold()(x)

    def forward_reference(self, x: Tensor) -> Tensor:
        """:meth:`forward`, as in the paper."""
        planes = x.reshape(-1, self.planes, self.side, self.side)
        inside = self.conv(planes).flatten(1).view(*x.shape[:-1], -1)
        return (self.linear(x) + inside) / 2

    def fold(self) -> Callable[[Tensor], Tensor]:
        """:meth:`forward` as a function, whose weight is computed now and not at each call."""
        if on_reference_path() or not self.can_be_folded():
            return self.forward_reference
        weight, bias = self.joint_weight()
        return partial(F.linear, weight=weight, bias=bias)

    def can_be_folded(self) -> bool:
        """Whether :meth:`joint_weight` does what the two layers do."""
        linear, conv = self.linear, self.conv
        return (
            is_plain(linear, nn.Linear)
            and is_plain_conv(conv, self.kernel_size, padding=self.kernel_size // 2)
            and (linear.bias is None) == (conv.bias is None)
        )

    def joint_weight(self) -> tuple[Tensor, Tensor | None]:
        """Weight ``(out_dims, embed_dims)`` and bias ``(out_dims,)`` of the equal Linear layer."""
        linear, kernel = self.linear, self.conv.weight  # (out_planes, planes, k, k)
        offsets = cell_offsets(self.side, kernel.shape[-1], kernel.device, kernel.dtype)
        inside = torch.einsum('oik,kpq->opiq', kernel.flatten(2), offsets)
        weight = (linear.weight + inside.reshape(linear.weight.shape)) / 2
        if linear.bias is None:
            return weight, None
        return weight, (linear.bias + self.conv.bias.repeat_interleave(self.side**2)) / 2


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
    offsets = along[:, None, :, None, :, None] * along[None, :, None, :, None, :]
    return offsets.reshape(kernel_size**2, side**2, side**2).to(device)


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
        """As torch initializes convolutions, which both layers are in the release."""
        self.fc1.reset_parameters()
        self.fc2.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """``(B, H, W, C) -> (B, H, W, C)``."""
        x = F.gelu(self.fc1(x))  # (B, H, W, hidden_dims)
        x = depthwise_conv(self.dwconv, x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x = F.gelu(x)
        return self.fc2(x)


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
        self.norm = nn.LayerNorm(planes)
        self.reduction = nn.Conv2d(
            planes, planes // 2, kernel_size, padding=kernel_size // 2, bias=False
        )

    def forward(self, x: Tensor) -> Tensor:
        """``(B, H, W, C) -> (B, ceil(H / 2), ceil(W / 2), 2 * C)``."""
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        cells = self.norm(unfold_planes(x, self.side, self.side))  # (B, rows, columns, planes)
        cells = self.reduction(cells.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return record_cells(fold_planes(cells, 1, 2 * self.side), 2 * self.side)


class StructuredSwinBlock(SwinBlock):
    """A Swin block that mixes channels along the planes of a token, and tokens along the grid.

    Args:
        embed_dims: Channels.
        num_heads: Attention heads.
        side: Side of the planes of a token, in cells.
        attn_kernel_size: Of the convolutions inside the tokens, beside the projections of
            attention; None for plain projections.
        mlp_kernel_size: Of the depth-wise convolution of the MLP.
        kwargs: Further arguments of :class:`~mmtoken.layers.common.swin.SwinBlock`.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        *,
        side: int,
        attn_kernel_size: int | None,
        mlp_kernel_size: int,
        **kwargs,
    ) -> None:
        linear = nn.Linear
        if attn_kernel_size is not None:
            linear = partial(StructuredLinear, side=side, kernel_size=attn_kernel_size)
        mlp = partial(StructuredMlp, kernel_size=mlp_kernel_size)
        super().__init__(embed_dims, num_heads, linear=linear, mlp=mlp, **kwargs)


class StructuredAttention(Attention):
    """Self-attention of all tokens of a grid, with projections that see the planes inside them.

    Args:
        embed_dims: Channels of a token.
        num_heads: Attention heads.
        qkv_bias: Biases of queries, keys and values.
        side: Side of the planes of a token, in cells.
        kernel_size: Of the convolutions inside the planes.
    """

    def __init__(
        self, embed_dims: int, num_heads: int, qkv_bias: bool, side: int, kernel_size: int
    ) -> None:
        linear = partial(StructuredLinear, side=side, kernel_size=kernel_size)
        super().__init__(embed_dims, num_heads, qkv_bias, linear)

    def attend(self, qkv: Tensor, attn_fn: AttentionFn) -> Tensor:
        """``(B, H, W, 3 * C) -> (B, H, W, C)``."""
        return super().attend(qkv.flatten(1, 2), attn_fn).unflatten(1, qkv.shape[1:3])


class StructuredBlock(ViTBlock):
    """A ViT block that mixes channels along the planes of a token, and tokens along the grid.

    Its tokens are on their grid, ``(B, H, W, C)``.

    Args:
        embed_dims: Channels of a token.
        num_heads: Attention heads.
        feedforward_channels: Hidden channels of the MLP.
        qkv_bias: Biases of queries, keys and values.
        drop_path: Stochastic depth rate.
        side: Side of the planes of a token, in cells.
        kernel_size: Of the convolutions inside the planes, in cells.
        mlp_kernel: Of the convolution of the token grid, in tokens.

    Example:
        >>> block = StructuredBlock(32, num_heads=2, feedforward_channels=64, side=4)
        >>> block(torch.zeros(1, 5, 7, 32)).shape
        torch.Size([1, 5, 7, 32])
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        feedforward_channels: int,
        qkv_bias: bool = True,
        drop_path: float = 0.0,
        side: int = 8,
        kernel_size: int = 3,
        mlp_kernel: int = 5,
    ) -> None:
        super().__init__(
            embed_dims,
            num_heads,
            feedforward_channels,
            qkv_bias,
            drop_path,
            attn=partial(StructuredAttention, side=side, kernel_size=kernel_size),
            mlp=partial(StructuredMlp, kernel_size=mlp_kernel),
        )
