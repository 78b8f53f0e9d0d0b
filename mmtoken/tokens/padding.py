"""Batch padding: rows and columns of zeros at the bottom and right of an image.

Detectors pad the images of a batch to one size. Padding is what need not be looked at closely.
"""

import torch
from torch import Tensor

from .regions import Regions


def valid_size(images: Tensor) -> Tensor:
    """Height and width without trailing rows and columns that are zero in every channel.

    Args:
        images: ``(B, C, H, W)``, padded after normalisation.

    Returns:
        ``(B, 2)``, in pixels, on the device of the images, without waiting for it. An image of
        zeros alone counts as a whole.
    """
    filled = (images != 0).any(dim=1)
    sizes = []
    for dim in (1, 2):
        line = filled.any(dim=3 - dim)
        end = torch.arange(1, line.shape[1] + 1, device=line.device)
        size = (line * end).amax(dim=1)
        sizes.append(torch.where(size > 0, size, line.shape[1]))
    return torch.stack(sizes, dim=1)


def padding_regions(valid: Tensor, stride: int, regions: Regions) -> Tensor:
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
