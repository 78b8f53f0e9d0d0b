"""Semantic tokens: pool the windows, think on few tokens, recover the image tokens.

A unit of six blocks replaces six Swin blocks::

    image tokens    x --Swin--+-----------+------------------------------+--> recover --> x
                              |           |                              |
    semantic tokens           +--> pool --+--> reduce --> local --> global

Each window of the image tokens is max-pooled to a few semantic tokens, which gather what they need
from the image tokens around them (*pool*, *reduce*), mix among themselves (*local*, *global*), and
are finally queried by the image tokens (*recover*). The image tokens stand still in between: four
of six blocks run on 9 tokens a window instead of 49.

Source: STViT-R, arXiv 2303.08685; released detection backbone,
github.com/changsn/STViT-R-Object-Detection (MIT). Parameter names are the official ones. Unlike
the release, which normalises and projects a token once for every patch that contains it (up to 81
times), keys and values are made once per token: the result is the same.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import DropPath, Mlp
from torch import Tensor

from ..tokens.attention import attention, join_heads, split_heads
from ..tokens.neighbourhood import Neighbourhood, PadMask, attend_groups, attend_patches
from ..tokens.plain import known_to_fast_paths
from ..tokens.reference import on_reference_path
from ..tokens.tiles import tokenwise, works_in_tiles
from ..tokens.windows import (
    max_pool_windows,
    merge_windows,
    pad_to_windows,
    partition_windows,
)
from .recompute import run_block

UNIT_DEPTH = 6


class Windowing(NamedTuple):
    """How a stage is cut into windows.

    Attributes:
        size: Window side, in image tokens.
        pooled_size: Window side, in semantic tokens.
        pad_mask: Which padding attention must not see, see
            :class:`~mmtoken.tokens.neighbourhood.Neighbourhood`.
    """

    size: int
    pooled_size: int
    pad_mask: PadMask


# Attention between projected queries ``(..., C)`` and keys and values ``(..., 2 * C)``.
Between = Callable[[Tensor, Tensor], Tensor]


@known_to_fast_paths
class CrossAttention(nn.Module):
    """Multi-head attention whose queries and keys are different tokens."""

    def __init__(self, embed_dims: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(embed_dims, embed_dims)
        self.kv = nn.Linear(embed_dims, 2 * embed_dims)
        self.proj = nn.Linear(embed_dims, embed_dims)

    def forward(self, query: Tensor, tokens: Tensor, between: Between | None = None) -> Tensor:
        """Attend.

        Args:
            query: ``(B, Q, C)``, or as ``between`` takes it.
            tokens: ``(B, K, C)``, likewise.
            between: Attention of what both are projected to, :meth:`attend` by default: each query
                attends to all tokens.

        Returns:
            In the shape of ``query``.
        """
        return self.proj((between or self.attend)(self.q(query), self.kv(tokens)))

    def attend(self, query: Tensor, key_value: Tensor) -> Tensor:
        """Attention of projected tokens to all: ``(B, Q, C), (B, K, 2 * C) -> (B, Q, C)``."""
        heads = (split_heads(t, self.num_heads) for t in (query, *key_value.chunk(2, dim=-1)))
        return join_heads(attention(*heads))


class SemanticBlock(nn.Module):
    """Attention and MLP with LayerScale, as all five blocks after the Swin block have them.

    One LayerNorm serves queries and keys. Subclasses say who attends to whom.
    """

    def __init__(
        self, embed_dims: int, num_heads: int, mlp_ratio: float = 4.0, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        self.layer_scale_1 = nn.Parameter(torch.full((embed_dims,), 1e-5))
        self.layer_scale_2 = nn.Parameter(torch.full((embed_dims,), 1e-5))
        self.norm1 = nn.LayerNorm(embed_dims)
        self.attn = CrossAttention(embed_dims, num_heads)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(embed_dims)
        self.mlp = Mlp(embed_dims, int(embed_dims * mlp_ratio))

    def update(
        self, query: Tensor, tokens: Tensor, between: Between, shortcut: bool = True
    ) -> Tensor:
        """Attention and MLP.

        Args:
            query: Not normalised, ``(..., C)``.
            tokens: What they attend to, not normalised, ``(..., C)``.
            between: Attention of projected tokens, see :class:`CrossAttention`.
            shortcut: Whether attention is added to the queries.

        Returns:
            In the shape of ``query``.
        """
        attn = self.attn

        def add(x: Tensor, attended: Tensor) -> Tensor:
            change = self.layer_scale_1 * attended
            x = x + self.drop_path(change) if shortcut else change
            return x + self.drop_path(self.layer_scale_2 * self.mlp(self.norm2(x)))

        if works_in_tiles(query, self.training, self):
            tile = partial(tokenwise, training=self.training, layers=(self,))
            attended = between(
                tile(lambda t: attn.q(self.norm1(t)), query),
                tile(lambda t: attn.kv(self.norm1(t)), tokens),
            )
            return tile(lambda t, a: add(t, attn.proj(a)), query, attended)
        return add(query, attn(self.norm1(query), self.norm1(tokens), between))

    def attend_to_all(self, query: Tensor, key_value: Tensor) -> Tensor:
        """Attention of projected tokens of grids ``(B, H, W, ...)`` to all others of the image."""
        return self.attn.attend(query.flatten(1, 2), key_value.flatten(1, -2)).view_as(query)


@known_to_fast_paths
class NeighbourhoodBlock(SemanticBlock):
    """A block whose keys lie in a patch around each window of queries.

    Args:
        key_size: Side of that patch, in tokens of the grid it is taken from.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        key_size: int,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__(embed_dims, num_heads, mlp_ratio, drop_path)
        self.key_size = key_size

    def look_around(self, query: Tensor, keys: Tensor, hood: Neighbourhood) -> Tensor:
        """Attend from each window of ``query`` to the patch of ``keys`` around it, then the MLP.

        Padding is added before the norm.

        Args:
            query: ``(B, H, W, C)``.
            keys: ``(B, H', W', C)``.
            hood: Who attends to whom.

        Returns:
            ``(B, H, W, C)``.
        """
        num_heads = self.attn.num_heads
        if on_reference_path():
            keys = F.pad(keys, (0, 0, *hood.padding))
            return self.update(query, keys, lambda q, kv: attend_patches(q, kv, hood, num_heads))

        def between(q: Tensor, kv: Tensor) -> Tensor:
            # Copies of overlapping patches are made again in backward: that takes less than it
            # would to keep them.
            return run_block(attend_groups, q, kv, hood, num_heads, recompute=True)

        return self.update(query, F.pad(keys.flatten(1, 2), (0, 0, 0, 1)), between)


@known_to_fast_paths
class ReduceBlock(NeighbourhoodBlock):
    """Semantic tokens gather from the image tokens around their window."""

    def forward(
        self, semantic: Tensor, x: Tensor, windows: Windowing, centers: Tensor | None = None
    ) -> Tensor:
        """Update semantic tokens.

        Args:
            semantic: ``(B, rows * n, columns * n, C)``, of windows pooled to n x n.
            x: Image tokens, ``(B, H, W, C)``, any H and W.
            windows: How the stage is cut.
            centers: Learned tokens that are added to the semantic ones first.
        """
        if centers is not None:
            semantic = semantic + centers
        grid, size = x.shape[1:3], windows.size
        hood = Neighbourhood(
            query_grid=tuple(semantic.shape[1:3]),
            query_size=windows.pooled_size,
            key_grid=tuple(grid),
            stride=size,
            size=self.key_size,
            hidden=tuple(-side % size for side in grid),
            pad_mask=windows.pad_mask,
        )
        return self.look_around(semantic, x, hood)


@known_to_fast_paths
class PoolBlock(ReduceBlock):
    """The first of the two reductions: it also makes the semantic tokens.

    Args:
        conv_pos: Add to the pooled tokens a depth-wise 3 x 3 convolution of them, window by window.
    """

    def __init__(self, embed_dims: int, *args, conv_pos: bool = False, **kwargs) -> None:
        super().__init__(embed_dims, *args, **kwargs)
        self.conv_pos = WindowPositionConv(embed_dims) if conv_pos else None

    def pool(self, x: Tensor, windows: Windowing) -> Tensor:
        """``(B, H, W, C) -> (B, rows * n, columns * n, C)``; padding takes part, as zeros."""
        x = pad_to_windows(x, windows.size)
        semantic = max_pool_windows(x, windows.size, windows.pooled_size)
        return semantic if self.conv_pos is None else self.conv_pos(semantic, windows.pooled_size)


@known_to_fast_paths
class WindowPositionConv(nn.Module):
    """Depth-wise 3 x 3 convolution inside each window of semantic tokens, added to them."""

    def __init__(self, embed_dims: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.Conv2d(embed_dims, embed_dims, 3, padding=1, groups=embed_dims)
        )

    def forward(self, semantic: Tensor, size: int) -> Tensor:
        """``(B, H, W, C) -> (B, H, W, C)``, in windows of ``size * size``."""
        grid = semantic.shape[1:3]
        windows = partition_windows(semantic, size).transpose(1, 2).unflatten(2, (size, size))
        position = self.proj(windows).flatten(2).transpose(1, 2)
        return semantic + merge_windows(position, size, grid)


@known_to_fast_paths
class LocalBlock(SemanticBlock):
    """Self-attention among the semantic tokens of each window."""

    def forward(self, semantic: Tensor, windows: Windowing) -> Tensor:
        """``(B, H, W, C) -> (B, H, W, C)``, the grid of semantic tokens."""
        size, grid = windows.pooled_size, semantic.shape[1:3]

        def between(query: Tensor, key_value: Tensor) -> Tensor:
            windows = (partition_windows(t, size) for t in (query, key_value))
            return merge_windows(self.attn.attend(*windows), size, grid)

        return self.update(semantic, semantic, between)


@known_to_fast_paths
class GlobalBlock(SemanticBlock):
    """Self-attention among all semantic tokens of an image."""

    def forward(self, semantic: Tensor) -> Tensor:
        """``(B, H, W, C) -> (B, H, W, C)``, the grid of semantic tokens."""
        return self.update(semantic, semantic, self.attend_to_all)


@known_to_fast_paths
class RecoverBlock(NeighbourhoodBlock):
    """Image tokens query the semantic tokens around their window."""

    def forward(self, x: Tensor, semantic: Tensor, windows: Windowing) -> Tensor:
        """Update image tokens.

        Args:
            x: Image tokens, ``(B, H, W, C)``, any H and W.
            semantic: ``(B, rows * n, columns * n, C)``, of windows pooled to n x n.
            windows: How the stage is cut.
        """
        size, pooled_size, pad_mask = windows
        # The released mask takes the padding of the image tokens for that of the semantic tokens.
        padding = tuple(-side % size for side in x.shape[1:3])
        if pad_mask == 'exact':
            padding = tuple(_pooled_padding(p, size, pooled_size) for p in padding)
        hood = Neighbourhood(
            query_grid=tuple(x.shape[1:3]),
            query_size=size,
            key_grid=tuple(semantic.shape[1:3]),
            stride=pooled_size,
            size=self.key_size,
            hidden=padding,
            pad_mask=pad_mask,
        )
        return self.look_around(x, semantic, hood)


def _pooled_padding(padding: int, size: int, pooled_size: int) -> int:
    """How many of a window's semantic rows are pooled from nothing but ``padding`` rows."""
    starts = (i * size // pooled_size for i in range(pooled_size))
    return sum(start >= size - padding for start in starts)


def semantic_unit(
    x: Tensor, blocks: list[nn.Module], windows: Windowing, centers: Tensor | None = None
) -> Tensor:
    """Run one unit of six blocks.

    Args:
        x: Image tokens, ``(B, H, W, C)``, any H and W.
        blocks: Swin, pool, reduce, local, global and recover block.
        windows: How the stage is cut.
        centers: Learned tokens for the reduce block, ``(1, rows * n, columns * n, C)``.

    Returns:
        Image tokens, ``(B, H, W, C)``.
    """
    swin, pool, reduce, mix_local, mix_global, recover = blocks
    x = swin(x)
    semantic = pool.pool(x, windows)
    semantic = pool(semantic, x, windows)
    semantic = reduce(semantic, x, windows, centers)
    semantic = mix_local(semantic, windows)
    semantic = mix_global(semantic)
    return recover(x, semantic, windows)
