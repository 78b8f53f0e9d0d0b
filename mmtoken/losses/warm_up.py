"""The weight of a loss, with a linear warm-up."""

import torch
from torch import Tensor, nn

from ..arguments import KnownArguments, is_number
from ..runtime.aux_losses import in_recompute


class WarmUpLoss(nn.Module, metaclass=KnownArguments):
    """Base of losses whose weight may rise linearly from 0.

    Args:
        loss_weight: Factor of the loss.
        warmup_iters: Number of training passes over which the factor rises from 0 to
            ``loss_weight``. They are counted in the buffer ``iterations``, which checkpoints keep.

    Raises:
        ValueError: An argument below 0.
    """

    def __init__(self, loss_weight: float, warmup_iters: int) -> None:
        super().__init__()
        for name, value in dict(loss_weight=loss_weight, warmup_iters=warmup_iters).items():
            if not is_number(value) or value < 0:
                raise ValueError(f'{name} must be 0 or more, got {value!r}')
        self.loss_weight = loss_weight
        self.warmup_iters = warmup_iters
        if warmup_iters:
            self.register_buffer('iterations', torch.zeros((), dtype=torch.int64))

    def _weight(self) -> Tensor | float:
        """The current factor; a training pass advances the warm-up."""
        if not self.warmup_iters:
            return self.loss_weight
        weight = self.loss_weight * (self.iterations / self.warmup_iters).clamp(max=1)
        if self.training and torch.is_grad_enabled() and not in_recompute():
            self.iterations += 1
        return weight
