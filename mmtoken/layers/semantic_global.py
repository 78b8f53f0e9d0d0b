"""Semantic tokens over a whole image: the blocks of STViT-R's classifiers.

At the 14 x 14 tokens that a classifier has in its third stage, attention need not be kept to a
neighbourhood. Three of the six blocks of a unit (:mod:`mmtoken.layers.semantic`) therefore differ
from those for dense prediction; parameters are the same, so a detector starts from a classifier's
weights.

Source: STViT-R, arXiv 2303.08685; released classifier, github.com/changsn/STViT-R (MIT).
"""

import torch
from torch import Tensor

from ..tokens.plain import known_to_fast_paths
from ..tokens.plan import cached_plan
from ..tokens.windows import merge_windows, partition_windows
from .semantic import PoolBlock, SemanticBlock, Windowing


@known_to_fast_paths
class OwnPoolBlock(PoolBlock):
    """Fresh semantic tokens attend to those of their own window and to the image tokens around it.

    Args:
        shortcut: Keep the pooled tokens and add the attention to them. The released classifiers
            were trained without.
        embed_dims, num_heads, key_size, mlp_ratio, drop_path, conv_pos: As for
            :class:`~mmtoken.layers.semantic.PoolBlock`.
    """

    def __init__(self, *args, shortcut: bool, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.shortcut = shortcut

    def forward(self, semantic: Tensor, x: Tensor, windows: Windowing) -> Tensor:
        """Update semantic tokens ``(B, rows * n, columns * n, C)`` from ``x``, ``(B, H, W, C)``."""
        size, grid = windows.pooled_size, semantic.shape[1:3]
        patches = inner_patches(tuple(x.shape[1:3]), self.key_size, windows.size, x.device)
        tokens = [semantic.flatten(1, 2), x.flatten(1, 2)]

        def between(query: Tensor, key_value: Tensor) -> Tensor:
            own, around = key_value.split([t.shape[1] for t in tokens], dim=1)
            own = partition_windows(own.unflatten(1, grid), size)
            around = around.index_select(1, patches.flatten())
            around = around.view(-1, patches.shape[1], around.shape[-1])
            query = partition_windows(query, size)
            return merge_windows(self.attn.attend(query, torch.cat([own, around], 1)), size, grid)

        return self.update(semantic, torch.cat(tokens, dim=1), between, self.shortcut)


@cached_plan
def inner_patches(
    grid: tuple[int, int], size: int, stride: int, device: torch.device | str = 'cpu'
) -> Tensor:
    """The patch around each window, moved to lie inside the grid: ``(windows, K)``.

    Args:
        grid: ``(H, W)``, in tokens, padding not counted.
        size: Side of a patch, in tokens; on a smaller grid, that grid.
        stride: Side of a window, in tokens.
        device: Of the tokens.

    Returns:
        Indices into the H * W tokens. On 14 x 14 tokens, patches of 10 start at 0 and 4.
    """
    sides = []
    for side in grid:
        length = min(size, side)
        start = torch.arange(0, side, stride) - (size - stride) // 2
        sides.append(start.clamp(0, side - length)[:, None] + torch.arange(length))
    rows, columns = sides
    index = rows[:, None, :, None] * grid[1] + columns[None, :, None, :]
    return index.flatten(2).flatten(0, 1).to(device)


@known_to_fast_paths
class GlobalReduceBlock(SemanticBlock):
    """Semantic tokens attend to themselves and to all image tokens."""

    def forward(
        self, semantic: Tensor, x: Tensor, windows: Windowing, centers: Tensor | None = None
    ) -> Tensor:
        """Update semantic tokens.

        Args:
            semantic: ``(B, rows * n, columns * n, C)``.
            x: Image tokens, ``(B, H, W, C)``.
            windows: How the stage is cut.
            centers: Learned tokens that are added to the queries, but not to the keys.
        """
        tokens = torch.cat([semantic.flatten(1, 2), x.flatten(1, 2)], dim=1)
        if centers is not None:
            semantic = semantic + centers
        return self.update(semantic, tokens, self.attend_to_all)


@known_to_fast_paths
class GlobalRecoverBlock(SemanticBlock):
    """Image tokens query all semantic tokens."""

    def forward(self, x: Tensor, semantic: Tensor, windows: Windowing) -> Tensor:
        """Update image tokens ``(B, H, W, C)`` from ``semantic``, ``(B, h, w, C)``."""
        return self.update(x, semantic, self.attend_to_all)
