"""Semantic tokens on a plain ViT: two layers that make them, and one that recovers image tokens.

::

    image tokens     X --+-----------+---------- (not updated) -----------+--> recover
                         |           |                                    |
    semantic tokens      +--> pool --+--> refine --> blocks on S2 alone --+
                              S1          S2

With P the pooled image tokens and G learned centers, the same for all images::

    pool:    S1' = P + MHA(P; X)                   S1 = S1' + MLP(S1')
    refine:  S2' = S1 + G + MHA(S1 + G; [S1; X])   S2 = S2' + MLP(S2')

where every sublayer normalizes its input, as in ViT.

Source: STViT, arXiv 2303.08685, section 3 (semantic token generation). The code for plain ViT was
not released. What the paper leaves open follows the released code for Swin,
github.com/changsn/STViT-R (MIT): one LayerNorm for queries and keys, and a residual around the
second attention that is its query. Recovery, too, is that of the Swin form: the paper has no dense
maps of a plain ViT.
"""

from typing import Literal, get_args

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ...runtime.decisions import record_rectangles
from ..common.positions import resample
from ..common.utils import ceil_div
from ..common.vit import NORM_EPS, CrossAttentionBlock
from ..common.windows import window_partition

Pooling = Literal['attention', 'max', 'mean']


class SpatialPooling(nn.Module):
    """Pool each tile of ``size * size`` image tokens to one token.

    A grid that is no multiple of ``size`` is padded on all sides, ``padding // 2`` at the top and
    left and the rest at the bottom and right; padding is left out of the pooling. With ``size=4``
    the 14 x 14 tokens of an image of 224 pixels become 4 x 4, and larger images have more.

    Args:
        embed_dims: Channels.
        size: Side of a tile, in image tokens.
        pooling: ``'attention'`` weights the tokens of a tile by the softmax of learned scores, as
            in the paper: a depth-wise 3 x 3 convolution inside the tile, LayerNorm over the
            channels, GELU, and a projection to one score. ``'max'`` and ``'mean'`` have no
            parameters.

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
        record_rectangles(
            'pooled to semantic tokens',
            x.shape[0],
            tuple(x.shape[1:3]),
            lambda place, side: (place + (-side % self.size) // 2) // self.size,
        )
        tiles = window_partition(self.pad(x), self.size)  # (B * tiles, size * size, C)
        padding = self.padding(x)
        if self.pooling == 'max':
            if padding is not None:
                tiles = tiles.masked_fill(padding, float('-inf'))
            pooled = tiles.amax(dim=1)
        else:
            scores = tiles.new_zeros(*tiles.shape[:2], 1)
            if self.pooling == 'attention':
                scores = self.scores(tiles)
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
        """Pad a grid ``(B, H, W, C)`` to whole tiles, as evenly on both sides as possible."""
        rows, columns = (-side % self.size for side in grid.shape[1:3])
        if not rows and not columns:
            return grid
        top, left = rows // 2, columns // 2
        return F.pad(grid, (0, 0, left, columns - left, top, rows - top), value=value)

    def padding(self, x: Tensor) -> Tensor | None:
        """Which tokens of the tiles are padding, ``(tiles, size * size, 1)``; None if none."""
        if all(side % self.size == 0 for side in x.shape[1:3]):
            return None
        grid = torch.zeros((1, *x.shape[1:3], 1), device=x.device)
        padding = window_partition(self.pad(grid, value=1.0), self.size) > 0
        return padding.repeat(x.shape[0], 1, 1)


Residual = Literal['query', 'initial']


class SemanticPoolBlock(CrossAttentionBlock):
    """Pool the image tokens to semantic tokens, which then attend to the image tokens.

    Args:
        embed_dims: Channels.
        semantic_size: Side of the tile that becomes one semantic token, in image tokens.
        pooling: See :class:`~mmtoken.layers.stvit.semantic_vit.SpatialPooling`.
        block: Arguments of :class:`~mmtoken.layers.common.vit.CrossAttentionBlock`.

    Example:
        >>> block = SemanticPoolBlock(32, 4, 'attention', num_heads=2, feedforward_channels=64)
        >>> semantic, initial = block(torch.zeros(1, 14 * 14, 32), (14, 14))
        >>> semantic.shape
        torch.Size([1, 16, 32])
    """

    def __init__(self, embed_dims: int, semantic_size: int, pooling: Pooling, **block) -> None:
        super().__init__(embed_dims, **block)
        self.pool = SpatialPooling(embed_dims, semantic_size, pooling)

    def forward(self, image: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Make semantic tokens.

        Args:
            image: Image tokens, ``(B, H * W, C)``, row by row.
            grid: ``(H, W)``.

        Returns:
            S1, ``(B, N, C)``, and P, the tokens that were pooled at first.
        """
        initial = self.pool(image.unflatten(1, grid))
        return super().forward(initial, image), initial


class SemanticRefineBlock(CrossAttentionBlock):
    """Semantic tokens attend to themselves and once more to the image tokens.

    Args:
        embed_dims: Channels.
        semantic_size: As for :class:`SemanticPoolBlock`.
        center_grid: Grid of the learned centers, in semantic tokens; None for no centers. On
            another grid they are resampled like position embeddings.
        residual: ``'query'`` adds the update to S1 + G, as the released code for Swin does;
            ``'initial'`` to P, which is another reading of the paper.
        block: Arguments of :class:`~mmtoken.layers.common.vit.CrossAttentionBlock`.

    Raises:
        ValueError: An unknown ``residual``.
    """

    def __init__(
        self,
        embed_dims: int,
        semantic_size: int,
        center_grid: tuple[int, int] | None,
        residual: Residual,
        **block,
    ) -> None:
        super().__init__(embed_dims, **block)
        if residual not in get_args(Residual):
            raise ValueError(
                f'refine_residual must be one of {get_args(Residual)}, got {residual!r}'
            )
        self.semantic_size = semantic_size
        self.center_grid = center_grid
        self.residual = residual
        if center_grid is not None:
            rows, columns = center_grid
            self.centers = nn.Parameter(0.02 * torch.randn(1, rows * columns, embed_dims))

    def forward(
        self, semantic: Tensor, initial: Tensor, image: Tensor, grid: tuple[int, int]
    ) -> Tensor:
        """Update semantic tokens.

        Args:
            semantic: S1, ``(B, N, C)``.
            initial: P, ``(B, N, C)``.
            image: X, ``(B, H * W, C)``.
            grid: ``(H, W)``.

        Returns:
            S2, ``(B, N, C)``.
        """
        query = semantic
        if self.center_grid is not None:
            grid = tuple(ceil_div(side, self.semantic_size) for side in grid)
            centers = resample(self.centers, self.center_grid, grid, 'bicubic', True)
            query = semantic + centers.flatten(1, 2)
        tokens = torch.cat([semantic, image], dim=1)
        return super().forward(query, tokens, initial if self.residual == 'initial' else query)


class SemanticRecovery(CrossAttentionBlock):
    """Recover the image tokens from the semantic tokens of one tap.

    A cross-attention block and a LayerNorm. The image tokens are those that the semantic tokens
    were made of. By default there is no LayerScale, as in the other blocks: the released recovery
    for Swin starts from 1e-5, which suits training on ImageNet with the recovery in place. Added to
    a trained backbone, it would at first hide the semantic tokens from the loss.

    Args:
        embed_dims: Channels.
        block: Arguments of :class:`~mmtoken.layers.common.vit.CrossAttentionBlock`.
    """

    def __init__(self, embed_dims: int, **block) -> None:
        super().__init__(embed_dims, **block)
        self.norm = nn.LayerNorm(embed_dims, NORM_EPS)

    def forward(self, image: Tensor, semantic: Tensor) -> Tensor:
        """``(B, H * W, C), (B, N, C) -> (B, H * W, C)``."""
        return self.norm(super().forward(image, semantic))
