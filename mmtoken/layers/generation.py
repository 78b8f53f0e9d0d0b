"""The two layers that make semantic tokens of the image tokens of a plain ViT.

::

    image tokens     X --+----------------+---------- (stand still) ------->
                         |                |
    semantic tokens      +--> pool (P) ---+--> refine --> blocks on S2 alone
                              S1               S2

With P the pooled image tokens and G learned centres, the same for all images::

    pool:    S1' = P + MHA(P; X)                   S1 = S1' + MLP(S1')
    refine:  S2' = S1 + G + MHA(S1 + G; [S1; X])   S2 = S2' + MLP(S2')

where every sublayer normalises what enters it, as in ViT.

Source: STViT, arXiv 2303.08685, section 3 (semantic token generation). The code for plain ViT was
not released. What the paper leaves open follows the released code for Swin,
github.com/changsn/STViT-R (MIT): one LayerNorm for queries and keys, and a residual around the
second attention that is its query.
"""

from typing import Literal, get_args

import torch
import torch.nn as nn
from torch import Tensor

from ..tokens.positions import resample
from .cross_block import CrossBlock
from .spatial_pooling import Pooling, SpatialPooling

Residual = Literal['query', 'initial']


class PoolLayer(CrossBlock):
    """Pool the image tokens to semantic tokens, and let these attend to them.

    Args:
        embed_dims: Channels.
        semantic_size: Side of the tile that becomes one semantic token, in image tokens.
        pooling: See :class:`~mmtoken.layers.spatial_pooling.SpatialPooling`.
        block: Arguments of :class:`~mmtoken.layers.cross_block.CrossBlock`.
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
            The semantic tokens, ``(B, N, C)``, and what they were pooled to at first.
        """
        initial = self.pool(image.unflatten(1, grid))
        return super().forward(initial, image), initial


class RefineLayer(CrossBlock):
    """Let the semantic tokens attend to themselves and once more to the image tokens.

    Args:
        embed_dims: Channels.
        semantic_size: As for :class:`PoolLayer`.
        center_grid: Grid of the learned centres, in semantic tokens; None for no centres. On
            another grid they are resampled, as position embeddings are.
        residual: ``'query'`` adds the update to S1 + G, as the released code for Swin does;
            ``'initial'`` to P, as one reading of the paper has it.
        block: Arguments of :class:`~mmtoken.layers.cross_block.CrossBlock`.

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
            grid = tuple(-(-side // self.semantic_size) for side in grid)
            centers = resample(self.centers, self.center_grid, grid, 'bicubic', True)
            query = semantic + centers.flatten(1, 2)
        tokens = torch.cat([semantic, image], dim=1)
        return super().forward(query, tokens, initial if self.residual == 'initial' else query)
