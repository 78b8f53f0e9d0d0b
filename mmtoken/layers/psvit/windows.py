"""Windows over a token grid of any size, clipped where the grid ends."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..common.cache import cache_by_shape

Pieces = tuple[tuple[int, int], ...]  # equal windows in a row: how many, of how many tokens


class RaggedWindows(NamedTuple):
    """A token grid cut into windows, those at the bottom and right border smaller.

    There is neither padding nor a mask: whole windows, those at the right border, those at the
    bottom and the one in the corner are up to four batches of equal windows.

    Attributes:
        pieces: Number and tokens of equal windows, batch after batch.
        order: ``(N,)``, tokens of the grid in the order of windows; None if that is their own.
        places: ``(N,)``, the inverse of ``order``; None likewise.
    """

    pieces: Pieces
    order: Tensor | None
    places: Tensor | None

    def to_windows(self, x: Tensor) -> Tensor:
        """Put the tokens of each image in order: ``(B, N, C) -> (B, N, C)``. Inverse: to_grid."""
        return x if self.order is None else x.index_select(1, self.order)

    def to_grid(self, x: Tensor) -> Tensor:
        """``(B, N, C) -> (B, N, C)``."""
        return x if self.places is None else x.index_select(1, self.places)


@cache_by_shape
def cut_windows(grid: tuple[int, int], size: int | None, device: torch.device) -> RaggedWindows:
    """Cut a grid into windows.

    Args:
        grid: ``(H, W)``, in tokens.
        size: Window side, in tokens; None for one window, the grid.
        device: Of the tokens.
    """
    size = max(grid) if size is None else size
    token = torch.arange(grid[0] * grid[1]).view(grid)
    pieces, order = [], []
    for rows in token.split([grid[0] // size * size, grid[0] % size]):
        for part in rows.split([grid[1] // size * size, grid[1] % size], dim=1):
            if part.numel():
                height, width = (min(side, size) for side in part.shape)
                part = part.unflatten(0, (-1, height)).unflatten(2, (-1, width)).transpose(1, 2)
                pieces.append((part.shape[0] * part.shape[1], height * width))
                order.append(part.flatten())
    order = torch.cat(order)
    if torch.equal(order, token.flatten()):
        return RaggedWindows(tuple(pieces), None, None)
    return RaggedWindows(tuple(pieces), order.to(device), order.argsort().to(device))
