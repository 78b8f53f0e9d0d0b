"""A share of tokens that is set on a finished model."""

from typing import Protocol, runtime_checkable

import torch.nn as nn

from ..arguments import is_number


@runtime_checkable
class Budgeted(Protocol):
    """A module that chooses how many tokens there are.

    Attributes:
        budget: Tokens over those of the dense network, at most; None for what the config says.
        least_budget: The smallest share that it can meet; None if it chooses nothing.
    """

    budget: float | None
    least_budget: float | None


def set_budget(model: nn.Module, tokens: float | None) -> nn.Module:
    """Fix the share of tokens that a trained network computes on.

    The scores of its routers or its gate, as they have been learned, decide which regions are fine,
    and the best ones of each image are, as many as the budget allows. So all images cost the same,
    and one checkpoint serves several speeds. It holds in training, too, and is not part of
    checkpoints. In a config the same is ``router=dict(query_ratio=...)`` for DGE,
    ``gate=dict(fine_ratio=...)`` for MSViT and ``least_tokens=...`` for MergeViT.

    Args:
        model: A detector, segmentor, classifier or backbone with DGE, MSViT or MPM; it is changed
            in place.
        tokens: Queries over tokens of each block, at most (DGE); tokens over patches, to the
            nearest region (MSViT); tokens over patches behind the last merge, at least (MPM). 1 at
            most. None goes back to what the config says.

    Returns:
        ``model``.

    Raises:
        ValueError: No part of the model chooses its tokens, or it cannot have so few.

    Example:
        >>> from mmtoken.backbones import MSViT
        >>> arch = dict(embed_dims=32, num_layers=2, num_heads=2, feedforward_channels=64)
        >>> backbone = set_budget(MSViT(arch), tokens=0.4)
        >>> backbone.budget
        0.4
    """
    choosing = [m for m in model.modules() if isinstance(m, Budgeted) and m.least_budget]
    if not choosing:
        raise ValueError(
            f'no part of {type(model).__name__} chooses its tokens: DGE, MSViT and MergeViT do, '
            'while dense twins, STViT-R, STViT, PSViT and SWAT always have the same'
        )
    least = max(module.least_budget for module in choosing)
    if tokens is not None and not (is_number(tokens) and least <= tokens <= 1):
        raise ValueError(f'tokens must be from {least:.4g} to 1 for this network, got {tokens!r}')
    for module in choosing:
        module.budget = tokens
    return model
