"""A loss that teaches the choice of regions by labels."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layers.common.labels import UNLABELED, label_purity, noted_labels
from ..registry import MODELS, build_loss
from ..runtime.aux_losses import publish, should_publish
from .rate import check_open_interval
from .warm_up import WarmUpLoss


@MODELS.register_module()
class LabelPurityLoss(WarmUpLoss):
    """Cross-entropy between the scores of regions and the coarsest choice that keeps their labels.

    A region keeps its labels with a choice if each of its cells has one label, up to
    ``1 - min_purity`` of its labelled pixels. So tokens become fine where a label changes. Labels
    are needed in training alone.

    The loss says what a region needs, and not how many tokens may be used: combine it with
    ``gate=dict(fine_ratio=...)`` of :class:`mmtoken.MSViT`, with
    ``router=dict(query_ratio=...)`` of :class:`mmtoken.DGEDeiT` and :class:`mmtoken.DGEPVT`, or
    with a budget.

    Args:
        min_purity: Share of the labelled pixels of a cell that must have its most frequent label,
            above 0 and below 1.
        loss_weight: Factor of the loss.
        warmup_iters: Number of training passes over which the factor rises from 0 to
            ``loss_weight``. They are counted in the buffer ``iterations``, which checkpoints keep.

    Raises:
        ValueError: An argument outside its range.
    """

    def __init__(
        self, min_purity: float = 0.95, loss_weight: float = 1.0, warmup_iters: int = 0
    ) -> None:
        super().__init__(loss_weight, warmup_iters)
        check_open_interval(min_purity=min_purity)
        self.min_purity = min_purity

    def forward(self, scores: Tensor, labels: Tensor, sides: Sequence[int], region: int) -> Tensor:
        """Compare scores with what the labels ask for.

        Args:
            scores: Of the choices of each region, finest first, ``(B, Hr, Wr, K)``.
            labels: ``(B, H, W)``; below 0 for pixels without a label.
            sides: Of the cells of each choice, in pixels.
            region: Side of a region, in pixels.

        Returns:
            The mean over regions with labelled pixels, float32, ``()``; 0 without any.
        """
        target, known = self.targets(labels, sides, region, scores.shape[1:3])
        losses = F.cross_entropy(scores.float().flatten(0, 2), target.flatten(), reduction='none')
        known = known.flatten()
        return self._weight() * (losses * known).sum() / known.sum().clamp(min=1)

    @torch.no_grad()
    def targets(
        self, labels: Tensor, sides: Sequence[int], region: int, shape: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """The coarsest choice that keeps the labels of each region.

        Args:
            labels, sides, region: As for :meth:`forward`.
            shape: Rows and columns of regions.

        Returns:
            Its index, ``(B, Hr, Wr)``, and whether the region has labelled pixels.
        """
        rows, columns = shape
        height, width = labels.shape[-2:]
        labels = F.pad(
            labels, (0, columns * region - width, 0, rows * region - height), value=UNLABELED
        )
        target = labels.new_zeros(len(labels), rows, columns)
        for index, side in enumerate(sides[1:], start=1):
            purity, _ = label_purity(labels, side)
            worst = -F.max_pool2d(-purity, region // side)
            target = torch.where(worst >= self.min_purity, index, target)
        return target, F.max_pool2d((labels >= 0).float(), region) > 0


def build_label_loss(cfg: dict | None) -> LabelPurityLoss | None:
    """Build the loss by which labels teach a choice; None for none."""
    if cfg is None:
        return None
    return build_loss(cfg, 'label_loss', 'mmtoken.LabelPurityLoss')


def publish_label_loss(
    loss: LabelPurityLoss | None,
    scores: Tensor,
    images: Tensor,
    sides: Sequence[int],
    region: int,
    training: bool = True,
) -> None:
    """In training, publish what a loss says of scores, by the labels of the batch.

    Args:
        loss: None publishes nothing.
        scores, sides, region: As for :meth:`LabelPurityLoss.forward`.
        images: The batch, ``(B, C, H, W)``, whose labels are noted.
        training: Whether what gave the scores trains.

    Raises:
        RuntimeError: Nobody collects losses, or the batch has no labels.
    """
    if loss is not None and should_publish(training):
        published = loss(scores, noted_labels(images), sides, region)
        publish(dict(loss_region_labels=published))
