"""Pool tiles of image tokens to one semantic token each.

Source: STViT, arXiv 2303.08685, the pooling inside windows of its semantic token generation; its
code was not released. The authors describe the scores in the discussion of their release,
github.com/changsn/STViT-R/issues/4. The paper also pools *between* windows, with offsets (eq. 5),
of which no more is public: it is left out.
"""

from typing import Literal, get_args

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..tokens.windows import partition_windows
from .cross_block import NORM_EPS

Pooling = Literal['attention', 'max', 'mean']


class SpatialPooling(nn.Module):
    """Pool each tile of ``size * size`` image tokens to one token.

    A grid that is no multiple of ``size`` is padded on all sides, ``padding // 2`` above and to the
    left and the rest below and to the right; what is padded is in no pool. So the 14 x 14 tokens
    of an image of 224 pixels become 4 x 4, with ``size=4``, and larger images have more.

    Args:
        embed_dims: Channels.
        size: Side of a tile, in image tokens.
        pooling: ``'attention'`` weighs the tokens of a tile by the softmax of learned scores, as in
            the paper: a depth-wise 3 x 3 convolution that stays inside the tile, LayerNorm over
            the channels, GELU, and a projection to one score. ``'max'`` and ``'mean'`` learn
            nothing.

    Raises:
        ValueError: An unknown ``pooling``, or a ``size`` below 1.
    """

    def __init__(self, embed_dims: int, size: int, pooling: Pooling = 'attention') -> None:
        super().__init__()
        if pooling not in get_args(Pooling):
            raise ValueError(f'pooling must be one of {get_args(Pooling)}, got {pooling!r}')
        if size < 1:
            raise ValueError(f'size must be at least 1, or None for the dense twin, got {size}')
        self.size = size
        self.pooling = pooling
        if pooling == 'attention':
            self.conv = nn.Conv2d(embed_dims, embed_dims, 3, padding=1, groups=embed_dims)
            self.norm = nn.LayerNorm(embed_dims, NORM_EPS)
            self.score = nn.Linear(embed_dims, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Pool a token grid.

        Args:
            x: Image tokens, ``(B, H, W, C)``, any H and W.

        Returns:
            Semantic tokens, ``(B, ceil(H / size) * ceil(W / size), C)``, row by row.
        """
        tiles = partition_windows(self.pad(x), self.size)
        padding = self.padding(x)
        if self.pooling == 'max':
            if padding is not None:
                tiles = tiles.masked_fill(padding, float('-inf'))
            pooled = tiles.amax(dim=1)
        else:
            scores = self.scores(tiles) if self.pooling == 'attention' else tiles.new_zeros(1, 1, 1)
            scores = scores.expand(*tiles.shape[:2], 1)
            if padding is not None:
                scores = scores.masked_fill(padding, float('-inf'))
            pooled = (scores.softmax(dim=1).to(tiles.dtype) * tiles).sum(dim=1)
        return pooled.view(x.shape[0], -1, x.shape[-1])

    def scores(self, tiles: Tensor) -> Tensor:
        """``(tiles, size * size, C) -> (tiles, size * size, 1)``."""
        side = (self.size, self.size)
        x = self.conv(tiles.transpose(1, 2).unflatten(2, side)).flatten(2).transpose(1, 2)
        return self.score(F.gelu(self.norm(x)))

    def pad(self, grid: Tensor, value: float = 0.0) -> Tensor:
        """``(B, H, W, C)`` to whole tiles, as evenly on both sides as can be."""
        rows, columns = (-side % self.size for side in grid.shape[1:3])
        if not rows and not columns:
            return grid
        top, left = rows // 2, columns // 2
        return F.pad(grid, (0, 0, left, columns - left, top, rows - top), value=value)

    def padding(self, x: Tensor) -> Tensor | None:
        """Where the tiles of a batch are padding, ``(tiles, size * size, 1)``; None if nowhere."""
        if all(side % self.size == 0 for side in x.shape[1:3]):
            return None
        grid = torch.zeros((1, *x.shape[1:3], 1), device=x.device)
        padding = partition_windows(self.pad(grid, value=1.0), self.size) > 0
        return padding.repeat(x.shape[0], 1, 1)
