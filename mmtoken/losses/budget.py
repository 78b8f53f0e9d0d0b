"""A loss that holds the cost of a network to a budget.

Source: Dynamic Grained Encoder, arXiv 2301.03831, budget loss; released code StevenGrove/vtpack
(Apache-2.0).
"""

import torch
from mmengine.dist import all_reduce, get_world_size
from torch import Tensor

from ..registry import MODELS
from .warm_up import WarmUpLoss


@MODELS.register_module()
class BudgetLoss(WarmUpLoss):
    """``loss_weight * (beta - target)**2``, beta being the share of the full cost that is used.

    Beta is the cost of the routed network over that of the full one, each summed over the images
    of all GPUs; the release takes those of one GPU. The penalty is soft: the released models with a
    target of 0.5 come out at 0.57 and 0.65.

    Args:
        target: The share to aim for, above 0 and at most 1.
        loss_weight: Factor of the loss.
        warmup_iters: Over how many training passes the factor rises from 0 to ``loss_weight``.
            They are counted in the buffer ``iterations``, which checkpoints keep.
        legacy: Whether the backbone should count the constant part of the cost as the release does,
            where an image has channels times height pixels. For comparing with its figures.
        num_classes: Classes of a classifier whose cost the backbone should count; 0 for none.

    Raises:
        ValueError: An argument outside its range.
    """

    def __init__(
        self,
        target: float = 0.5,
        loss_weight: float = 1.0,
        warmup_iters: int = 0,
        legacy: bool = False,
        num_classes: int = 0,
    ) -> None:
        super().__init__(loss_weight, warmup_iters)
        if not 0 < target <= 1:
            raise ValueError(f'target must be above 0 and at most 1, got {target}')
        if not num_classes >= 0:
            raise ValueError(f'num_classes must be 0 or more, got {num_classes}')
        self.target = target
        self.legacy = legacy
        self.num_classes = num_classes

    def forward(self, static: Tensor, dynamic: Tensor) -> tuple[Tensor, Tensor]:
        """Compare the cost of images with the budget.

        In distributed training all processes must call it, each with its own images.

        Args:
            static: Cost of each image in the full network, float32 or float64, ``(B,)``.
            dynamic: Cost of each image as routed, likewise; gradients flow through it.

        Returns:
            The loss, float32, ``()``, and beta without its graph, of the inputs' type, ``()``.

        Raises:
            ValueError: Unequal shapes.
        """
        if static.shape != dynamic.shape:
            raise ValueError(
                'static and dynamic must have one value for each image, got shapes '
                f'{tuple(static.shape)} and {tuple(dynamic.shape)}'
            )
        static, dynamic = static.detach().sum(), dynamic.sum()
        sums = torch.stack([static, dynamic.detach()])
        all_reduce(sums)
        full, used = sums[0].clamp(min=1), sums[1]
        # The value is that of all images together. The gradient comes from the images here alone,
        # but for all processes: DDP takes the mean over them, which makes it the sum again.
        share = get_world_size() * dynamic / full
        beta = used / full + (share - share.detach())
        loss = self._weight() * (beta - self.target) ** 2
        return loss.float(), beta.detach()
