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

Prefix tokens (a class token, registers) are not pooled. They accompany the semantic tokens: they
query, and are keys, beside P and X, then S1, then S2, as they do in the blocks of ViT.

Where positions are rotary, a semantic token is turned by the mean of the rotations of the image
tokens that it was pooled from, whatever their weights in the pooling; image tokens that are keys,
or that query in the recovery, by their own.

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
from ..common.rotary import Rotation
from ..common.utils import ceil_div
from ..common.vit import NORM_EPS, AttentionFn, CrossAttentionBlock, full_attention
from ..common.windows import window_partition
from .groups import record_attended

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
        tiles, padding = split_tiles(x, self.size)
        if self.pooling == 'max':
            if padding is not None:
                tiles = tiles.masked_fill(padding, float('-inf'))
            pooled = tiles.amax(dim=1)
        else:
            scores = tiles.new_zeros(*tiles.shape[:2], 1)
            if self.pooling == 'attention':
                scores = self.scores(tiles)
            pooled = weighted_mean(tiles, scores, padding)
        return pooled.view(x.shape[0], -1, x.shape[-1])

    def scores(self, tiles: Tensor) -> Tensor:
        """``(tiles, size * size, C) -> (tiles, size * size, 1)``."""
        side = (self.size, self.size)
        x = self.conv(tiles.transpose(1, 2).unflatten(2, side)).flatten(2).transpose(1, 2)
        return self.score(F.gelu(self.norm(x)))


def split_tiles(x: Tensor, size: int) -> tuple[Tensor, Tensor | None]:
    """Tiles of a grid, padded as evenly on both sides as possible.

    Args:
        x: Tokens, ``(B, H, W, C)``.
        size: Side of a tile, in tokens.

    Returns:
        ``(B * tiles, size * size, C)``, and which of these are padding,
        ``(B * tiles, size * size, 1)``; None if none.
    """
    rows, columns = (-side % size for side in x.shape[1:3])
    if not rows and not columns:
        return window_partition(x, size), None
    top, left = rows // 2, columns // 2
    sides = (0, 0, left, columns - left, top, rows - top)
    inside = torch.zeros((1, *x.shape[1:3], 1), device=x.device)
    padding = window_partition(F.pad(inside, sides, value=1.0), size) > 0
    return window_partition(F.pad(x, sides), size), padding.repeat(x.shape[0], 1, 1)


def weighted_mean(tiles: Tensor, scores: Tensor, padding: Tensor | None) -> Tensor:
    """Mean of each tile, weighted by the softmax of scores, without padding.

    ``(tiles, size * size, C), (tiles, size * size, 1) -> (tiles, C)``.
    """
    if padding is not None:
        scores = scores.masked_fill(padding, float('-inf'))
    return (scores.softmax(dim=1).to(tiles.dtype) * tiles).sum(dim=1)


def turn_tiles(
    rotation: Rotation | None, grid: tuple[int, int], semantic_size: int
) -> Rotation | None:
    """The rotation of semantic tokens, the mean of those of each tile.

    Args:
        rotation: Of image tokens, row by row, prefix tokens first; None where positions are not
            rotary.
        grid: ``(H, W)``, of the image tokens.
        semantic_size: Side of a tile, in image tokens.

    Returns:
        That of prefix tokens and semantic tokens, row by row.
    """
    if rotation is None:
        return None
    height, width = grid
    prefix, image = rotation.cos_sin.tensor_split([len(rotation.cos_sin) - height * width])
    tiles, padding = split_tiles(image.unflatten(0, grid)[None], semantic_size)
    means = weighted_mean(tiles, tiles.new_zeros(*tiles.shape[:2], 1), padding)
    return rotation.like(torch.cat([prefix, means]))


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

    def forward(
        self, tokens: Tensor, grid: tuple[int, int], attn_fn: AttentionFn = full_attention
    ) -> tuple[Tensor, Tensor]:
        """Make semantic tokens.

        Args:
            tokens: Prefix tokens, then image tokens row by row, ``(B, P + H * W, C)``.
            grid: ``(H, W)``.
            attn_fn: Attention of queries to keys and values.

        Returns:
            Prefix tokens and S1, ``(B, P + N, C)``; and what they were before attention: the prefix
            tokens that were given, and those that were pooled.
        """
        height, width = grid
        prefix, image = tokens.tensor_split([tokens.shape[1] - height * width], dim=1)
        initial = torch.cat([prefix, self.pool(image.unflatten(1, grid))], dim=1)
        return super().forward(initial, tokens, attn_fn=attn_fn), initial


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
        self,
        semantic: Tensor,
        initial: Tensor,
        image: Tensor,
        grid: tuple[int, int],
        attn_fn: AttentionFn = full_attention,
    ) -> Tensor:
        """Update semantic tokens, and prefix tokens before them.

        Args:
            semantic: Prefix tokens and S1, ``(B, P + N, C)``.
            initial: The second result of :class:`SemanticPoolBlock`, ``(B, P + N, C)``.
            image: X, ``(B, H * W, C)``.
            grid: ``(H, W)``.
            attn_fn: Attention of queries to keys and values.

        Returns:
            Prefix tokens and S2, ``(B, P + N, C)``.
        """
        query = semantic
        if self.center_grid is not None:
            rows, columns = (ceil_div(side, self.semantic_size) for side in grid)
            centers = resample(self.centers, self.center_grid, (rows, columns), 'bicubic', True)
            prefix, query = semantic.tensor_split([semantic.shape[1] - rows * columns], dim=1)
            query = torch.cat([prefix, query + centers.flatten(1, 2)], dim=1)
        tokens = torch.cat([semantic, image], dim=1)
        residual = initial if self.residual == 'initial' else query
        return super().forward(query, tokens, residual, attn_fn)


class SemanticRecovery(CrossAttentionBlock):
    """Recover the image tokens from the semantic tokens of one tap.

    A cross-attention block and a LayerNorm. The image tokens are those that the semantic tokens
    were made of; prefix tokens take no part. By default there is no LayerScale: the released
    recovery for Swin starts from 1e-5, which suits training on ImageNet with the recovery in place.
    Added to a trained backbone, it would at first hide the semantic tokens from the loss.

    Args:
        embed_dims: Channels.
        block: Arguments of :class:`~mmtoken.layers.common.vit.CrossAttentionBlock`.
    """

    def __init__(self, embed_dims: int, **block) -> None:
        super().__init__(embed_dims, **block)
        self.norm = nn.LayerNorm(embed_dims, self.norm1.eps)

    def forward(
        self, image: Tensor, semantic: Tensor, attn_fn: AttentionFn = full_attention
    ) -> Tensor:
        """``(B, H * W, C), (B, N, C) -> (B, H * W, C)``."""
        return self.norm(super().forward(image, semantic, attn_fn=attn_fn))

    def record(
        self,
        image: Tensor,
        semantic: Tensor,
        grid: tuple[int, int],
        attn_fn: AttentionFn = full_attention,
    ) -> None:
        """Record which semantic token each image token attends to most; for pictures."""

        def attend(query: Tensor, key_value: Tensor, num_heads: int) -> Tensor:
            return self.attn.attend(query, key_value, attn_fn)

        record_attended(self, image, semantic, grid, attend)
