"""When to work tile by tile, how large a tile is, and which layers have a tiled forward.

The intermediate activations of a block (projections, the hidden layer of the MLP) are several times
larger than its tokens. For a whole map they go to memory and back; for a tile they stay in the
cache. On a CPU that halves the time of an early Swin block.
"""

from collections.abc import Callable

import torch
import torch.nn as nn
from torch import Tensor

from ..layers.common.plain import all_plain
from ..runtime.reference import is_compiling, on_reference_path

# The hidden layer of an MLP is then 3 MB in fp32.
TILE_ELEMENTS = 192_000

TILED: dict[type[nn.Module], type[nn.Module]] = {}  # each layer class, and its tiled subclass


def tiled(kind: type[nn.Module]) -> type[nn.Module]:
    """Class decorator: a subclass of a layer whose forward is faster on a CPU."""
    TILED[kind.__base__] = kind
    return kind


def tokens_per_tile(channels: int) -> int:
    """Tokens in a tile: 2000 of 96 channels, 500 of 384."""
    return max(1, TILE_ELEMENTS // channels)


def use_tiling(module: nn.Module, x: Tensor) -> bool:
    """Whether a tiled forward is taken: in CPU inference, if all layers of the module are plain.

    A layer that somebody has replaced or watches is called once, with the whole map
    (:mod:`~mmtoken.layers.common.plain`).
    """
    if module.training or x.device.type != 'cpu' or torch.is_grad_enabled() or is_compiling():
        return False
    return not on_reference_path() and all_plain(module)


def chunked_apply(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Apply a function that treats every token by itself, tile by tile.

    Args:
        function: ``(n, C), ... -> (n, C')``.
        tensors: ``(..., C)``, of equal shapes but for the channels.

    Returns:
        ``(..., C')``.
    """
    length = tokens_per_tile(max(t.shape[-1] for t in tensors))
    num_tokens = tensors[0].shape[:-1].numel()
    if num_tokens <= length:
        return function(*tensors)
    tiles = zip(*(t.reshape(-1, t.shape[-1]).split(length) for t in tensors), strict=True)
    out, start = None, 0
    for tile in tiles:
        result = function(*tile)
        if out is None:
            out = result.new_empty(num_tokens, result.shape[-1])
        out[start : start + len(result)] = result
        start += len(result)
    return out.view(*tensors[0].shape[:-1], -1)
