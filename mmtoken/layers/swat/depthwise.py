"""A depth-wise convolution with a fast gradient of its weight on a CPU.

oneDNN's kernel for this gradient takes at most three columns of weights at a time. For more, torch
falls back to one that spends a whole SIMD register on each channel, which takes seven times as long
as the forward pass.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ...runtime.reference import on_reference_path
from ..common.plain import is_plain_conv
from ..common.precision import full_precision

MAX_COLUMNS = 3  # of weights in oneDNN's kernel


def depthwise_conv(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """``conv(x)`` of a depth-wise convolution that keeps the size of a map.

    Args:
        conv: With an odd kernel, padded by half of it.
        x: ``(B, C, H, W)``, with channels last.

    Returns:
        ``(B, C, H, W)``.
    """
    if on_reference_path() or not has_slow_gradient(conv, x):
        return conv(x)
    return _SplitGradientConv.apply(x, conv.weight, conv.bias)


def has_slow_gradient(conv: nn.Module, x: Tensor) -> bool:
    """Whether the weight of a wide plain kernel needs a gradient in float32 on a CPU."""
    if not (torch.is_grad_enabled() and x.device.type == 'cpu' and type(conv) is nn.Conv2d):
        return False
    side = conv.kernel_size[0]
    return (
        MAX_COLUMNS < side <= x.shape[3]
        and is_plain_conv(conv, side, padding=side // 2, groups=x.shape[1])
        and conv.weight.requires_grad
        and x.dtype == conv.weight.dtype == torch.float32
    )


class _SplitGradientConv(torch.autograd.Function):
    """A depth-wise convolution whose weight gradient is computed a few columns at a time."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        with full_precision(x.device):
            return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=len(weight))

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        half, needed = weight.shape[-1] // 2, ctx.needs_input_grad
        grad_x = _convolution_backward(grad, x, weight, (half, half), 0) if needed[0] else None
        grad_bias = grad.sum(dim=(0, 2, 3)) if needed[2] else None
        return grad_x, weight_gradient(grad, x, weight), grad_bias


def weight_gradient(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """The gradient of the weight, :data:`MAX_COLUMNS` columns at a time.

    Args:
        grad: Of the output, ``(B, C, H, W)``.
        x: Input, ``(B, C, H, W)``.
        weight: ``(C, 1, k, k)``.

    Returns:
        ``(C, 1, k, k)``.
    """
    half, columns = weight.shape[-1] // 2, []
    for i in range(0, weight.shape[-1], MAX_COLUMNS):
        part = weight[..., i : i + MAX_COLUMNS]
        # Column i of the kernel sees pixel w + i - half for output w.
        left, right = half - i, i + part.shape[-1] - 1 - half
        # One image after another: the same memory serves all of them.
        columns.append(
            sum(
                _convolution_backward(g, shift(image, left, right), part, (half, 0), 1)
                for g, image in zip(grad.split(1), x.split(1), strict=True)
            )
        )
    return torch.cat(columns, dim=3)


def shift(x: Tensor, left: int, right: int) -> Tensor:
    """Add columns of zeros, or remove columns, as ``F.pad(x, (left, right))`` does.

    ``F.pad`` fills all of the result with zeros before it copies.
    """
    rows = x[..., max(-left, 0) : x.shape[3] - max(-right, 0)].permute(0, 2, 3, 1)
    batch, height, _, channels = rows.shape
    left, right = (rows.new_zeros(batch, height, max(n, 0), channels) for n in (left, right))
    return torch.cat([left, rows, right], dim=2).permute(0, 3, 1, 2)


def _convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, padding: tuple[int, int], wanted: int
) -> Tensor:
    """The gradient of a depth-wise convolution for its input (0) or its weight (1)."""
    mask = [wanted == i for i in range(3)]
    return torch.ops.aten.convolution_backward(
        grad, x, weight, None, (1, 1), padding, (1, 1), False, (0, 0), len(weight), mask
    )[wanted]
