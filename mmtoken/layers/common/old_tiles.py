"""Work tile by tile: large maps are taken through a whole block a few windows at a time.

What stands between two tokens of a block (projections, the hidden layer of the MLP) is several
times larger than the tokens. For a whole map it is written to memory that the system must first
hand out and later fetch back into the cache; for a tile it never leaves the cache. On a CPU that
halves the time of an early Swin block. Training keeps those tensors for backward anyway, and a GPU
would rather have few large kernels, so both take whole maps. So do blocks in which somebody has
replaced or watches a layer (:mod:`~mmtoken.layers.common.plain`), which is to see whole maps too.
"""

from collections.abc import Callable, Iterable

import torch
import torch.nn as nn
from torch import Tensor

from ...runtime.reference import on_reference_path
from .plain import all_plain

# The hidden layer of an MLP is then 3 MB in fp32.
TILE_ELEMENTS = 192_000


def tokens_per_tile(channels: int) -> int:
    """Tokens in a tile: 2000 of 96 channels, 500 of 384."""
    return max(1, TILE_ELEMENTS // channels)


def use_tiling(x: Tensor, training: bool, *layers: nn.Module) -> bool:
    """Whether ``x`` is to be computed on tile by tile.

    Args:
        x: Any tensor of the map.
        training: Whether the computation has random parts, or parts that depend on the batch.
        layers: All layers that take part, which must be plain.
    """
    inference = not training and not torch.is_grad_enabled()
    on_cpu = inference and x.device.type == 'cpu' and not on_reference_path()
    return on_cpu and all_plain(*layers)


def chunked_apply(
    function: Callable[..., Tensor], *tensors: Tensor, training: bool, layers: Iterable[nn.Module]
) -> Tensor:
    """Apply a function that treats every token by itself, in inference tile by tile.

    Args:
        function: ``(n, C), ... -> (n, C')``.
        tensors: ``(..., C)``, alike but for their channels.
        training: As for :func:`use_tiling`.
        layers: Likewise: those that ``function`` calls.

    Returns:
        ``(..., C')``.
    """
    length = tokens_per_tile(max(t.shape[-1] for t in tensors))
    small = tensors[0].shape[:-1].numel() <= length
    if small or not use_tiling(tensors[0], training, *layers):
        return function(*tensors)
    tiles = zip(*(t.reshape(-1, t.shape[-1]).split(length) for t in tensors), strict=True)
    out, start = None, 0
    for tile in tiles:
        result = function(*tile)
        if out is None:
            out = result.new_empty(tensors[0].shape[:-1].numel(), result.shape[-1])
        out[start : start + len(result)] = result
        start += len(result)
    return out.view(*tensors[0].shape[:-1], -1)
