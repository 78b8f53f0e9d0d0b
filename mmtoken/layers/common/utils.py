"""Small functions that several methods share."""

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn as nn
from timm.layers import trunc_normal_
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .packed import SparseFeatures


def to_map(x: Tensor) -> Tensor:
    """Tokens on their grid to a map: ``(B, H, W, C) -> (B, C, H, W)``.

    The map is contiguous: RoIAlign of mmcv misreads maps in the channels-last format.
    """
    return x.permute(0, 3, 1, 2).contiguous()


def join_maps(outputs: Sequence) -> tuple:
    """Outputs as they are, but backward through one of them is backward through all.

    A neck may leave outputs out (``start_level=1`` of mmdet's FPN). What only these need, a norm
    for example, would then have no gradient, on which DDP fails; so it has one of zero.

    Args:
        outputs: Maps or vectors, or :class:`~mmtoken.layers.common.packed.SparseFeatures`.

    Returns:
        The same, with the same values and memory.
    """
    sparse = [isinstance(out, SparseFeatures) for out in outputs]
    tensors = [out.tokens if s else out for out, s in zip(outputs, sparse, strict=True)]
    if len(outputs) < 2 or not torch.is_grad_enabled():
        return tuple(outputs)
    if not any(tensor.requires_grad for tensor in tensors):
        return tuple(outputs)
    joined = _Join.apply(*tensors)
    return tuple(
        out._replace(tokens=t) if s else t
        for out, t, s in zip(outputs, joined, sparse, strict=True)
    )


class _Join(torch.autograd.Function):
    """The identity of several tensors; gradients that are missing become zero, as torch does."""

    @staticmethod
    def forward(ctx, *tensors: Tensor) -> tuple[Tensor, ...]:
        # Detached, since views that a function returns may not be changed in place.
        return tuple(tensor.detach() for tensor in tensors)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, ...]:
        return grads


def run_block(function: Callable, *args, recompute: bool):
    """Call ``function``; with ``recompute`` its activations are made again in backward.

    A trace has no backward of its own.
    """
    if recompute and torch.is_grad_enabled() and not torch.jit.is_tracing():
        return checkpoint(function, *args, use_reentrant=False)
    return function(*args)


def init_own(root: nn.Module) -> None:
    """Let the layers inside ``root`` that have an ``init_weights`` of their own use it.

    Called after a general initialization, which would otherwise overwrite theirs.
    """
    for module in root.modules():
        if module is not root and hasattr(module, 'init_weights'):
            module.init_weights()


def trunc_normal_parameter(*shape: int) -> nn.Parameter:
    """An embedding, initialized as in ViT."""
    return nn.Parameter(trunc_normal_(torch.empty(shape), std=0.02))


def ceil_div(a: int, b: int) -> int:
    """``a / b``, rounded up."""
    return -(-a // b)


def drop_path_rates(rate: float, depths: Iterable[int]) -> list[list[float]]:
    """Stochastic depth of each block of each stage, rising linearly from 0 to ``rate``."""
    depths = list(depths)
    last = max(sum(depths) - 1, 1)
    rates = iter([rate * i / last for i in range(sum(depths))])
    return [[next(rates) for _ in range(depth)] for depth in depths]


def check_heads(embed_dims: int, num_heads: int, where: str = '') -> None:
    """Refuse heads that do not divide the channels.

    Args:
        embed_dims: Channels.
        num_heads: Attention heads.
        where: In front of the message, such as ``'stage 2: '``.

    Raises:
        ValueError: They do not.
    """
    if num_heads < 1 or embed_dims % num_heads:
        raise ValueError(f'{where}embed_dims={embed_dims} is no multiple of num_heads={num_heads}')
