"""How far the feature maps of a network are from those of another of the same shapes."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layers.common.precision import full_precision


def normalized_mse(maps: Tensor, wanted: Tensor) -> Tensor:
    """Mean squared difference of features that have mean 0 and variance 1 over their channels.

    ``(B, C, H, W)`` twice to ``(B, H, W)``, from 0 to 4.
    """
    first, second = (x.permute(0, 2, 3, 1) for x in (maps, wanted))
    channels = first.shape[-1:]
    difference = F.layer_norm(first, channels) - F.layer_norm(second, channels)
    return difference.square().mean(dim=-1)


def cosine_distance(maps: Tensor, wanted: Tensor) -> Tensor:
    """One minus the cosine of the angle between features: ``(B, C, H, W)`` to ``(B, H, W)``."""
    return 1 - F.cosine_similarity(maps, wanted, dim=1)


DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = dict(
    mse=normalized_mse, cosine=cosine_distance
)


def map_distance(
    maps: Tensor, wanted: Tensor, sizes: Tensor | None = None, distance: str = 'mse'
) -> Tensor:
    """Mean distance of two maps over the positions that show an image.

    Args:
        maps: ``(B, C, H, W)``, of any floating type.
        wanted: In the same shape.
        sizes: Rows and columns of each map that are not padding, ``(B, 2)``; None for all.
        distance: A key of :data:`DISTANCES`.

    Returns:
        ``()``, float32.
    """
    with full_precision(maps.device):
        distances = DISTANCES[distance](maps.float(), wanted.float())
    if sizes is None:
        return distances.mean()
    rows, columns = (torch.arange(n, device=maps.device) for n in distances.shape[1:])
    shown = (rows < sizes[:, :1])[:, :, None] & (columns < sizes[:, 1:])[:, None, :]
    return distances.masked_fill(~shown, 0).sum() / shown.sum()
