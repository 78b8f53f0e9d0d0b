"""Resampling of position embeddings."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .cache import cache_by_shape
from .precision import full_precision


def resample(
    embedding: Tensor, old: tuple[int, int], new: tuple[int, int], mode: str, antialias: bool
) -> Tensor:
    """Interpolate an embedding to another grid.

    Torch has no deterministic gradient of this on a GPU. Under
    ``torch.use_deterministic_algorithms`` the interpolation is done by matrix products instead: it
    is a linear map of rows and of columns.

    Args:
        embedding: ``(1, old rows * columns, C)``, row by row.
        old: Rows and columns of its grid.
        new: Rows and columns of the new grid.
        mode: ``'bilinear'`` or ``'bicubic'``.
        antialias: Whether to average when the grid becomes smaller.

    Returns:
        ``(1, *new, C)``, the embedding itself if the grid is the same.
    """
    embedding = embedding.unflatten(1, old)
    if tuple(old) == tuple(new) and not torch.jit.is_tracing():
        return embedding  # a trace may be used for other grids
    # Half precision would be inaccurate, and is not available on a CPU.
    wide = embedding.to(torch.promote_types(embedding.dtype, torch.float32))
    if torch.are_deterministic_algorithms_enabled():
        rows, columns = (
            interpolation(a, b, mode, antialias, wide.device, wide.dtype)
            for a, b in zip(old, new, strict=True)
        )
        with full_precision(wide.device):
            wide = torch.matmul(columns, torch.tensordot(rows, wide[0], dims=1))[None]
    else:
        wide = F.interpolate(wide.permute(0, 3, 1, 2), size=new, mode=mode, antialias=antialias)
        wide = wide.permute(0, 2, 3, 1)
    return wide.to(embedding.dtype)


@cache_by_shape
def interpolation(
    old: int, new: int, mode: str, antialias: bool, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """The weights of the interpolation along one axis, ``(new, old)``."""
    # One channel: torch 2.11 confuses places and channels of maps that are one token wide.
    places = torch.eye(old, dtype=torch.float64)[None, None]
    taken = F.interpolate(places, size=(old, new), mode=mode, antialias=antialias)
    return taken[0, 0].T.to(device, dtype)
