"""Batch padding below and to the right of the images of a batch.

Detectors pad the images of a batch to one size, and padding needs no fine tokens. The size of an
image cannot be inferred with certainty: padding may have any color, and an image may end in black.
So the sizes are stored on the batch tensor itself (:func:`set_image_sizes`). Without them, trailing
zeros are taken for padding.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .regions import RegionLayout

_NOTE = '_mmtoken_image_sizes'  # an attribute of a batch


def set_image_sizes(images: Tensor, sizes: Tensor | Sequence[Sequence[int]]) -> None:
    """Tell backbones the sizes of the images of a batch without padding.

    For your own training and inference loops::

        images = images.to(device)
        mmtoken.set_image_sizes(images, [(480, 640), (512, 500)])
        maps = backbone(images)

    The sizes hold for this tensor and for windows sliced out of it, not for copies of it (another
    device or dtype). For whole models of OpenMMLab there is
    :func:`mmtoken.follow_image_sizes`, which reads them from data samples.

    Args:
        images: ``(B, C, H, W)``, padded at the bottom and right.
        sizes: Height and width of each image, in pixels, ``(B, 2)``.

    Raises:
        ValueError: Sizes for another number of images, or of images that are larger than the batch
            or empty.
    """
    given = torch.as_tensor(sizes)
    batch, height, width = len(images), *images.shape[-2:]
    if given.shape != (batch, 2) or given.is_floating_point():
        raise ValueError(
            f'sizes must be {batch} pairs of integers, height and width of each image of the '
            f'batch, got {sizes}'
        )
    if not ((given >= 1) & (given <= given.new_tensor([height, width]))).all():
        raise ValueError(
            f'images in a batch of {height} x {width} pixels must be from 1 x 1 up to that, '
            f'got {given.tolist()}'
        )
    note_sizes(images, given.long())


def note_sizes(images: Tensor, sizes: Tensor) -> None:
    """:func:`set_image_sizes` without checks."""
    setattr(images, _NOTE, sizes)


def noted_sizes(x: Tensor) -> Tensor | None:
    """Sizes that are stored on a batch, or on the batch that it is a window of.

    Args:
        x: ``(B, C, H, W)``.

    Returns:
        ``(B, 2)``, on the device of ``x``, at least 1 x 1 even if a window lies wholly in the
        padding. None if there are none.
    """
    sizes = getattr(x, _NOTE, None)
    if sizes is None and x._base is not None:
        whole = getattr(x._base, _NOTE, None)
        sizes = None if whole is None else _sizes_in_window(x, x._base, whole)
    return None if sizes is None else sizes.to(x.device)


def sizes_on_map(images: Tensor, map_: Tensor) -> Tensor | None:
    """Stored sizes of images in places of a map of them, rounded up.

    Args:
        images: ``(B, C, H, W)``.
        map_: ``(B, C', H', W')``, of the whole batch.

    Returns:
        ``(B, 2)``, on the device of the images; None if none are stored.
    """
    sizes = noted_sizes(images)
    if sizes is None:
        return None
    sides, places = (sizes.new_tensor(x.shape[-2:]) for x in (images, map_))
    return -(-sizes * places // sides)


def valid_size(images: Tensor) -> Tensor:
    """Height and width of each image without its padding.

    Args:
        images: ``(B, C, H, W)``.

    Returns:
        ``(B, 2)``, in pixels, on the device of the images, without a host sync: stored sizes if
        there are any, otherwise those of :func:`filled_size`.
    """
    noted = noted_sizes(images)
    return filled_size(images) if noted is None else noted


def filled_size(images: Tensor) -> Tensor:
    """Height and width without trailing rows and columns that are zero in every channel.

    Args:
        images: ``(B, C, H, W)``, padded after normalisation.

    Returns:
        ``(B, 2)``, in pixels, on the device of the images. An image of zeros alone counts as a
        whole.
    """
    filled = (images != 0).any(dim=1)
    sizes = []
    for dim in (1, 2):
        line = filled.any(dim=3 - dim)
        end = torch.arange(1, line.shape[1] + 1, device=line.device)
        size = (line * end).amax(dim=1)
        sizes.append(torch.where(size > 0, size, line.shape[1]))
    return torch.stack(sizes, dim=1)


def padding_regions(valid: Tensor, stride: int, regions: RegionLayout) -> Tensor:
    """Regions that lie wholly in the padding.

    Args:
        valid: From :func:`valid_size`.
        stride: Of a token, in pixels.
        regions: Of the token grid.

    Returns:
        ``(B, Hr, Wr)``, bool.
    """
    rows, columns = (
        torch.arange(n, device=valid.device) * (regions.region_size * stride) for n in regions.shape
    )
    below = rows >= valid[:, :1]
    right = columns >= valid[:, 1:]
    return below[:, :, None] | right[:, None, :]


def _sizes_in_window(window: Tensor, batch: Tensor, sizes: Tensor) -> Tensor | None:
    """Size of the part of each image that a window shows; None if the view is no window.

    Args:
        window: A view of the batch, as sliding inference cuts it out: ``(b, c, h, w)``.
        batch: ``(B, C, H, W)``.
        sizes: Of its images, ``(B, 2)``.

    Returns:
        ``(b, 2)``.
    """
    if window.ndim != 4 or batch.ndim != 4 or window.stride() != batch.stride():
        return None
    # Position of the first element of the window in the batch, outermost dimension first
    offset, start = window.storage_offset() - batch.storage_offset(), [0] * 4
    for dim in sorted(range(4), key=batch.stride, reverse=True):
        if batch.shape[dim] > 1:
            start[dim], offset = divmod(offset, batch.stride(dim))
    first, _, top, left = start
    shown = sizes[first : first + len(window)] - sizes.new_tensor([top, left])
    return shown.clamp(min=1).minimum(sizes.new_tensor(window.shape[-2:]))
