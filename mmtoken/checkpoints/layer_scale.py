"""Multiply LayerScale into the layers before it, for models that have none.

LayerScale multiplies the output of attention or MLP by a factor for each channel. The last layer of
either is linear, so a layer with other weights computes the same::

    gamma * (W x + b) = (gamma * W) x + gamma * b
"""

import torch
from torch import Tensor

from .report import Report

State = dict[str, Tensor]

# LayerScale in a ViT block, and the layer whose output it multiplies
SCALED_LAYERS = {'.ls1.gamma': '.attn.proj', '.ls2.gamma': '.mlp.fc2'}


def fold_scales(state: State, own: State, report: Report) -> None:
    """Fold the LayerScale of each block in ``state`` that has none in ``own``.

    Products are taken in float32 or wider, and rounded to the type that the layer has in the file.
    What has no such layer in the file, or another number of channels, stays as it is; and so do
    blocks that the model does not have.

    Args:
        state: Tensors of a file by our names; tensors are replaced, not changed.
        own: Those of the model.
        report: Is updated.
    """
    for scale, layer in SCALED_LAYERS.items():
        for name in [name for name in state if name.endswith(scale) and name not in own]:
            block = name.removesuffix(scale)
            parts = [part for part in _parameters(f'{block}{layer}') if part in state]
            fits = all(state[part].shape[:1] == state[name].shape for part in parts)
            if not (parts and fits and any(key.startswith(f'{block}.') for key in own)):
                continue
            gamma = state.pop(name)
            state |= {part: _multiply(gamma, state[part]) for part in parts}
            report.folded_scales.append(report.mapped.pop(name))


def _parameters(layer: str) -> tuple[str, str]:
    return f'{layer}.weight', f'{layer}.bias'


def _multiply(gamma: Tensor, parameter: Tensor) -> Tensor:
    """``(C,), (C, ...) -> (C, ...)``."""
    precise = torch.promote_types(parameter.dtype, torch.float32)
    factors = gamma.to(precise).view(-1, *[1] * (parameter.ndim - 1))
    return (factors * parameter.to(precise)).to(parameter.dtype)
