"""Label maps that are stored on a batch of images, for losses on the choices of regions."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

UNLABELED = -1
_NOTE = '_mmtoken_labels'  # an attribute of a batch


def set_label_maps(images: Tensor, labels: Tensor) -> None:
    """Tell backbones the labels of a batch, from which routers and gates can learn.

    For your own training loops; under MMEngine's runner :class:`mmtoken.TokenLossHook` does this::

        mmtoken.set_label_maps(images, labels)
        with mmtoken.token_losses() as published:
            maps = backbone(images)

    The labels hold for this tensor, not for copies of it.

    Args:
        images: ``(B, C, H, W)``.
        labels: Classes, or numbers of instances, ``(B, H, W)``, integers; below 0 for pixels
            without a label.

    Raises:
        ValueError: Labels of another shape or type.
    """
    if labels.shape != (len(images), *images.shape[-2:]) or labels.is_floating_point():
        raise ValueError(
            f'labels must be integers of shape {(len(images), *images.shape[-2:])}, got '
            f'{labels.dtype} of shape {tuple(labels.shape)}'
        )
    note_labels(images, lambda: labels)


def note_labels(images: Tensor, make: Callable[[], Tensor | None]) -> None:
    """:func:`set_label_maps`, of labels that are made when a loss asks for them."""
    setattr(images, _NOTE, make)


def noted_labels(images: Tensor) -> Tensor:
    """The labels of a batch, ``(B, H, W)``, int64, on the device of the images.

    Raises:
        RuntimeError: There are none.
    """
    make = getattr(images, _NOTE, None)
    labels = None if make is None else make()
    if labels is None:
        raise RuntimeError(
            'a loss teaches regions by labels, but this batch has none. Under a runner they come '
            'from gt_sem_seg or gt_instances by mmtoken.TokenLossHook; in your own loop, call '
            'mmtoken.set_label_maps(images, labels), or leave the loss out'
        )
    return labels.to(images.device, torch.int64)


def label_purity(labels: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """How much of each cell of a label map has one label.

    Args:
        labels: ``(B, H, W)``; below 0 for pixels without a label.
        side: Of a cell, in pixels. Cells at the bottom and right may be cut off.

    Returns:
        The share of the most frequent label among the labelled pixels, ``(B, rows, columns)``,
        float32, and whether there are any; the share is 1 where there are none.
    """
    height, width = labels.shape[-2:]
    padding = (0, -width % side, 0, -height % side)
    labels = F.pad(labels, padding, value=UNLABELED)
    cells = labels.unflatten(2, (-1, side)).unflatten(1, (-1, side))
    cells = cells.permute(0, 1, 3, 2, 4).flatten(3)  # (B, rows, columns, side * side)
    labeled = cells >= 0
    # Pixels without a label are each of their own, so that they never are the most frequent.
    places = torch.arange(cells.shape[-1], device=cells.device)
    cells = torch.where(labeled, cells, -1 - places)
    most = (cells == cells.mode(dim=-1, keepdim=True).values).sum(dim=-1)
    count = labeled.sum(dim=-1)
    return torch.where(count > 0, most / count.clamp(min=1), 1.0), count > 0
