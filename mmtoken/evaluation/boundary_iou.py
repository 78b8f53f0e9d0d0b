"""Scores of segmentation near the edges of labels, where coarse tokens would show first."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmseg.evaluation import IoUMetric
from torch import Tensor

from ..registry import METRICS


@METRICS.register_module()
class BoundaryIoUMetric(IoUMetric):
    """mmseg's ``IoUMetric`` over the pixels near an edge of a label; the rest is ignored.

    In a config, beside the scores of all pixels::

        val_evaluator = [
            dict(type='IoUMetric', iou_metrics=['mIoU']),
            dict(type='mmtoken.BoundaryIoUMetric', iou_metrics=['mIoU']),
        ]

    The labels alone decide which pixels count, so that all models are scored on the same ones.

    Args:
        width: How far from another label a pixel counts, in pixels of the label map, along rows,
            columns or diagonals.
        prefix: Of the names of the scores, as in ``boundary/mIoU``.
        kwargs: As for ``mmseg.IoUMetric``.

    Raises:
        ValueError: ``width`` is not a positive integer.
    """

    def __init__(self, width: int = 3, prefix: str = 'boundary', **kwargs) -> None:
        if isinstance(width, bool) or not isinstance(width, int) or width < 1:
            raise ValueError(f'width must be a positive integer, in pixels, got {width!r}')
        super().__init__(prefix=prefix, **kwargs)
        self.width = width

    def process(self, data_batch: dict, data_samples: Sequence[dict]) -> None:
        """Count the pixels near edges of a batch."""
        samples = []
        for sample in data_samples:
            if 'gt_sem_seg' in sample:  # a test set without labels is for format_only
                labels = sample['gt_sem_seg']['data']
                near = near_edges(labels, self.width, self.ignore_index)
                labels = torch.where(near, labels, self.ignore_index)
                sample = {**sample, 'gt_sem_seg': {**sample['gt_sem_seg'], 'data': labels}}
            samples.append(sample)
        super().process(data_batch, samples)


def near_edges(labels: Tensor, width: int, ignore_index: int = 255) -> Tensor:
    """Pixels within a distance of a pixel with another label.

    Args:
        labels: ``(..., H, W)``, integers.
        width: The distance, in pixels.
        ignore_index: Pixels without a label, which make no edge and are near none.

    Returns:
        ``(..., H, W)``, bool.
    """
    labeled = labels != ignore_index
    values = labels.float().reshape(-1, 1, *labels.shape[-2:])
    ignored = ~labeled.view_as(values)
    side = 2 * width + 1
    highest = F.max_pool2d(values.masked_fill(ignored, -torch.inf), side, 1, width)
    lowest = -F.max_pool2d((-values).masked_fill(ignored, -torch.inf), side, 1, width)
    return (highest > lowest).view_as(labels) & labeled
