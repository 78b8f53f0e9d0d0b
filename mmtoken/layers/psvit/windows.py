"""Windows over a token grid of any size, smaller at its bottom and right border."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..common.cache import cache_by_shape


class RaggedWindows(NamedTuple):
    """A token grid divided into windows, without padding and without a mask.

    Whole windows, those at the right border, those at the bottom border and the one in the corner
    are up to four groups of windows of equal size.

    Attributes:
        groups: For each group the number of windows and the tokens of a window.
        perm: ``(N,)``, the tokens of the grid, window after window; None if that is their order.
        inverse_perm: ``(N,)``, the inverse of ``perm``; None likewise.
    """

    groups: tuple[tuple[int, int], ...]
    perm: Tensor | None
    inverse_perm: Tensor | None

    def to_windows(self, x: Tensor) -> Tensor:
        """Order the tokens by windows: ``(B, N, C) -> (B, N, C)``. Inverse: :meth:`to_grid`."""
        return x if self.perm is None else x.index_select(1, self.perm)

    def to_grid(self, x: Tensor) -> Tensor:
        """Order the tokens row by row: ``(B, N, C) -> (B, N, C)``."""
        return x if self.inverse_perm is None else x.index_select(1, self.inverse_perm)

    def split(self, x: Tensor) -> list[Tensor]:
        """Separate the groups, each a batch of windows. Inverse: :meth:`join`.

        ``(B, N, heads, d)``, ordered by windows, to one ``(B * windows, heads, L, d)`` per group.
        """
        groups = x.split([windows * length for windows, length in self.groups], dim=1)
        return [
            group.unflatten(1, windows_by_length).flatten(0, 1).transpose(1, 2)
            for group, windows_by_length in zip(groups, self.groups, strict=True)
        ]

    def join(self, groups: list[Tensor]) -> Tensor:
        """One ``(B * windows, heads, L, d)`` per group to ``(B, N, heads, d)``."""
        parts = [
            group.transpose(1, 2).unflatten(0, (-1, windows)).flatten(1, 2)
            for group, (windows, _) in zip(groups, self.groups, strict=True)
        ]
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


@cache_by_shape
def divide_into_windows(
    grid: tuple[int, int], size: int | None, device: torch.device
) -> RaggedWindows:
    """Divide a grid into windows.

    Args:
        grid: ``(H, W)``, in tokens.
        size: Side of a window, in tokens; None for one window, the whole grid.
        device: Of the tokens.
    """
    size = max(grid) if size is None else size
    token = torch.arange(grid[0] * grid[1]).view(grid)
    groups, perm = [], []
    for rows in token.split([grid[0] // size * size, grid[0] % size]):
        for part in rows.split([grid[1] // size * size, grid[1] % size], dim=1):
            if part.numel():
                height, width = (min(side, size) for side in part.shape)
                # (window rows, rows, window columns, columns), of which the middle two are swapped
                part = part.unflatten(0, (-1, height)).unflatten(2, (-1, width)).transpose(1, 2)
                groups.append((part.shape[0] * part.shape[1], height * width))
                perm.append(part.flatten())
    perm = torch.cat(perm)
    if torch.equal(perm, token.flatten()):
        return RaggedWindows(tuple(groups), None, None)
    return RaggedWindows(tuple(groups), perm.to(device), perm.argsort().to(device))
