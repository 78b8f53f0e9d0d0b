"""Label maps of a batch, from the data samples of OpenMMLab's models."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.structures import BaseDataElement
from torch import Tensor

from ..layers.common.labels import UNLABELED

IGNORED = 255  # as mmseg's datasets and data preprocessor mark pixels without a label


def labels_of_samples(samples: Any, shape: tuple[int, int]) -> Tensor | None:
    """What data samples say of each pixel of a batch, after all augmentation and padding.

    ``gt_sem_seg`` gives classes. Otherwise ``gt_instances`` gives the number of an instance, or 0:
    from its masks, or else from boxes.

    Args:
        samples: Data samples, one an image.
        shape: Height and width of the batch.

    Returns:
        ``(B, H, W)``, int64; -1 for padding and ignored pixels. None if a sample has no labels.
    """
    if not isinstance(samples, Sequence) or not samples:
        return None
    maps = [_labels_of_sample(sample) for sample in samples]
    if any(map_ is None for map_ in maps):
        return None
    height, width = shape
    return torch.stack([
        F.pad(m, (0, width - m.shape[1], 0, height - m.shape[0]), value=UNLABELED) for m in maps
    ])  # fmt: skip


def _labels_of_sample(sample: Any) -> Tensor | None:
    """``(h, w)`` of one image, perhaps without padding."""
    if not isinstance(sample, BaseDataElement):
        return None
    if 'gt_sem_seg' in sample:
        labels = sample.gt_sem_seg.data[0].long()
        return torch.where(labels == IGNORED, UNLABELED, labels)
    if 'gt_instances' not in sample:
        return None
    height, width = sample.metainfo['img_shape'][:2]
    instances = sample.gt_instances
    if 'masks' in instances:
        masks = instances.masks
        if not isinstance(masks, Tensor):
            masks = masks.to_tensor(torch.bool, _device_of(instances))
        masks = masks[:, :height, :width].bool()
        numbers = torch.arange(1, len(masks) + 1, device=masks.device)
        if not len(masks):
            return torch.zeros(height, width, dtype=torch.long, device=masks.device)
        return (masks * numbers[:, None, None]).amax(dim=0)
    if 'bboxes' not in instances:
        return None
    boxes = getattr(instances.bboxes, 'tensor', instances.bboxes)
    labels = torch.zeros(height, width, dtype=torch.long, device=boxes.device)
    # Small boxes are painted last, since they would vanish below large ones.
    sizes = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)
    for number in sizes.argsort(descending=True).tolist():
        left, top, right, bottom = boxes[number].round().long().clamp(min=0).tolist()
        labels[top:bottom, left:right] = number + 1
    return labels


def _device_of(instances: BaseDataElement) -> torch.device:
    return next(
        (v.device for v in instances.values() if isinstance(v, Tensor)), torch.device('cpu')
    )
