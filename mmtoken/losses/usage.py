"""What grained blocks use, and the losses made of it."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from ..registry import MODELS
from ..runtime.aux_losses import publish, should_publish

# What backbones and necks are held to if not told otherwise, as in the released code.
BUDGET = dict(type='mmtoken.BudgetLoss', target=0.5, loss_weight=1.0)


def build_budget(budget: dict | None, granularities: Sequence[int]) -> nn.Module | None:
    """Build the loss that a network of these granularities is held to; None if it has no choice."""
    return None if budget is None or len(granularities) == 1 else MODELS.build(budget)


def counted_pixels(valid: Tensor, in_channels: int, legacy: bool, dtype: torch.dtype) -> Tensor:
    """Pixels of each image, as the budget counts them, ``(B,)``.

    Args:
        valid: Sizes of the images, ``(B, 2)``, in pixels.
        in_channels: Channels of the images.
        legacy: Count as the release does, which takes channels times height for the area.
        dtype: Of the result.
    """
    return (in_channels * valid[:, 0] if legacy else valid.prod(dim=1)).to(dtype)


class Usage(NamedTuple):
    """What a block needs for each image, in counts of the budget: ``(B,)``.

    It is float32 in training, for some devices have no float64: good for shares to seven digits.

    Attributes:
        static: Complexity if all tokens were queries.
        dynamic: Complexity of the queries there are; in training it has gradients.
        tokens: Tokens, without those of padding.
        queries: Queries, likewise.
    """

    static: Tensor
    dynamic: Tensor
    tokens: Tensor
    queries: Tensor


def usage_wanted(budget: nn.Module | None, training: bool) -> bool:
    """Whether a network should measure what its blocks use, for :func:`publish_usage`.

    Args:
        budget: A :class:`mmtoken.BudgetLoss`, or None.
        training: Whether the network is in training mode.

    Raises:
        RuntimeError: It should, but nobody collects losses.
    """
    return budget is not None and should_publish(training)


def publish_usage(
    stages: Sequence[Sequence[Usage]],
    constant: Tensor | float,
    budget: nn.Module,
    prefix: str = '',
) -> None:
    """Publish the budget loss of a network and how many of its tokens were queries.

    Args:
        stages: Usage of each block of each stage.
        constant: Complexity that does not depend on choices, for each image, ``(B,)``.
        budget: A :class:`mmtoken.BudgetLoss`.
        prefix: In front of the names.
    """
    blocks = [usage for stage in stages for usage in stage]
    static = constant + sum(usage.static for usage in blocks)
    dynamic = constant + sum(usage.dynamic for usage in blocks)
    loss, ratio = budget(static, dynamic)
    values = {f'{prefix}loss_budget': loss, f'{prefix}budget_ratio': ratio}
    for i, stage in enumerate(stages):
        queries, tokens = (
            sum(getattr(u, name).sum() for u in stage) for name in ('queries', 'tokens')
        )
        values[f'{prefix}query_ratio_s{i}'] = (queries / tokens.clamp(min=1)).detach()
    publish(values)
