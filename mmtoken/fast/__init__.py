"""CPU inference, faster: blocks work tile by tile, so that their activations stay in the cache.

Layers and backbones do not know of this room. :func:`optimize_for_cpu` exchanges the classes of
finished modules for subclasses with a tiled ``forward``; every backbone and neck gets that when it
is built. A tiled forward is taken in CPU inference alone (:func:`~mmtoken.fast.tiling.use_tiling`):
training, GPUs, export and ``torch.compile`` run the forward of the layer itself.
"""

import torch.nn as nn

from ..layers.common.plain import know
from . import dge, stem, swin  # noqa: F401 (they register tiled layers)
from .tiling import TILED

__all__ = ['optimize_for_cpu']

OWN_ROOMS = tuple(f'{__package__.rpartition(".")[0]}.{room}.' for room in ('fast', 'layers'))


def optimize_for_cpu(model: nn.Module, enabled: bool = True) -> nn.Module:
    """Let the blocks of a model work tile by tile in CPU inference.

    Args:
        model: Any module; it is changed in place. Its parameters and their names stay.
        enabled: False takes it back.

    Returns:
        ``model``.
    """
    exchange = TILED if enabled else {tiled: kind for kind, tiled in TILED.items()}
    for module in model.modules():
        kind = type(module)
        if kind.__module__.startswith(OWN_ROOMS):
            know(kind)
        if kind in exchange:
            module.__class__ = exchange[kind]
            know(exchange[kind])
    return model
