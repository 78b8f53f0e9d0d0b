"""A loss that holds the share of coarse regions to a target."""

import torch
from mmengine.dist import all_reduce, get_world_size
from torch import Tensor

from ..arguments import is_number
from ..registry import MODELS
from .warm_up import WarmUpLoss


@MODELS.register_module()
class CoarseRatioLoss(WarmUpLoss):
    """``loss_weight * (rate - target_coarse_ratio)**2``, rate being the mean of the soft gate.

    The mean is over the regions of all GPUs. This is the simple alternative to
    :class:`BatchShapingLoss`, a penalty like that of L0: it does not constrain single regions, so
    the gate may choose the same for every image.

    Args:
        target_coarse_ratio: The share of coarse regions to aim for, above 0 and below 1.
        loss_weight: Factor of the loss.
        warmup_iters: Number of training passes over which the factor rises from 0 to
            ``loss_weight``. They are counted in the buffer ``iterations``, which checkpoints keep.

    Raises:
        ValueError: An argument outside its range.
    """

    def __init__(
        self,
        target_coarse_ratio: float = 0.5,
        loss_weight: float = 1.0,
        warmup_iters: int = 0,
    ) -> None:
        super().__init__(loss_weight, warmup_iters)
        check_open_interval(target_coarse_ratio=target_coarse_ratio)
        self.target_coarse_ratio = target_coarse_ratio

    def forward(self, coarse: Tensor, valid_mask: Tensor | None = None) -> Tensor:
        """Compare the rate of images with the target.

        In distributed training all processes must call it, each with its own images.

        Args:
            coarse: Probability that a region is coarse, ``(B, Hr, Wr)``.
            valid_mask: Regions that count, bool, ``(B, Hr, Wr)``; None for all. Those that lie in
                the padding of a batch should not.

        Returns:
            The loss, float32, ``()``; 0 if no region counts.

        Raises:
            ValueError: Shapes or types other than these.
        """
        valid_mask = check_regions(coarse, valid_mask)
        # Not float64, which some devices do not have.
        coarse = coarse.to(torch.promote_types(coarse.dtype, torch.float32))
        own = coarse.masked_fill(~valid_mask, 0).sum()
        sums = torch.stack([own.detach(), valid_mask.sum().to(own.dtype)])
        all_reduce(sums)
        total, count = sums[0], sums[1].clamp(min=1)
        # The gradient comes from the local regions only, multiplied by the number of processes,
        # since DDP averages over them.
        share = get_world_size() * own / count
        rate = total / count + (share - share.detach())
        excess = (rate - self.target_coarse_ratio) * (sums[1] > 0)
        return (self._weight() * excess**2).float()


def check_open_interval(**values: float) -> None:
    """Refuse, with ValueError, values that are not above 0 and below 1, by their names."""
    for name, value in values.items():
        if not is_number(value) or not 0 < value < 1:
            raise ValueError(f'{name} must be above 0 and below 1, got {value!r}')


def check_regions(coarse: Tensor, valid_mask: Tensor | None) -> Tensor:
    """Regions that count, bool, ``(B, Hr, Wr)``; ValueError if the two do not match."""
    if coarse.ndim != 3 or not coarse.is_floating_point():
        raise ValueError(
            'coarse must be floating point of shape (B, Hr, Wr), got '
            f'{coarse.dtype} of shape {tuple(coarse.shape)}'
        )
    if valid_mask is None:
        return torch.ones_like(coarse, dtype=torch.bool)
    if valid_mask.shape != coarse.shape or valid_mask.dtype != torch.bool:
        raise ValueError(
            f'valid_mask must be torch.bool of the shape of coarse, {tuple(coarse.shape)}, got '
            f'{valid_mask.dtype} of shape {tuple(valid_mask.shape)}'
        )
    return valid_mask
