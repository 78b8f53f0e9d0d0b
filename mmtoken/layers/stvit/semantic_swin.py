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

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, trunc_normal_
from torch import Tensor

from ...runtime.reference import on_reference_path
from ..common.cache import cache_by_shape
from ..common.old_tiles import chunked_apply, use_tiling
from ..common.positions import resample
from ..common.swin import SwinBlock
from ..common.utils import run_block
from ..common.vit import CrossAttention
from ..common.windows import (
    max_pool_windows,
    pad_to_windows,
    window_partition,
    window_reverse,
)
from .neighborhood import (
    NeighborhoodSpec,
    PadMask,
    neighborhood_attention,
    neighborhood_attention_reference,
)

UNIT_DEPTH = 6


class WindowSpec(NamedTuple):
    """How a stage is cut into windows.

    Attributes:
        size: Window side, in image tokens.
        pooled_size: Window side, in semantic tokens.
        pad_mask: Which padding attention must not see, see
            :class:`~mmtoken.layers.stvit.neighborhood.NeighborhoodSpec`.
    """

    size: int
    pooled_size: int
    pad_mask: PadMask


# Attention between projected queries ``(..., C)`` and keys and values ``(..., 2 * C)``.
Between = Callable[[Tensor, Tensor], Tensor]


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

        if use_tiling(query, self.training, self):
            tile = partial(chunked_apply, training=self.training, layers=(self,))
            attended = between(
                tile(lambda t: attn.q(self.norm1(t)), query),
                tile(lambda t: attn.kv(self.norm1(t)), tokens),
            )
            return tile(lambda t, a: add(t, attn.proj(a)), query, attended)
        return add(query, attn(self.norm1(query), self.norm1(tokens), between))

    def attend_to_all(self, query: Tensor, key_value: Tensor) -> Tensor:
        """Attention of projected tokens of grids ``(B, H, W, ...)`` to all others of the image."""
        return self.attn.attend(query.flatten(1, 2), key_value.flatten(1, -2)).view_as(query)


class NeighborhoodBlock(SemanticBlock):
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

    def look_around(self, query: Tensor, keys: Tensor, spec: NeighborhoodSpec) -> Tensor:
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
            keys = F.pad(keys, (0, 0, *spec.padding))
            return self.update(
                query, keys, lambda q, kv: neighborhood_attention_reference(q, kv, spec, num_heads)
            )

        def between(q: Tensor, kv: Tensor) -> Tensor:
            # Copies of overlapping patches are made again in backward: that takes less than it
            # would to keep them.
            return run_block(neighborhood_attention, q, kv, spec, num_heads, recompute=True)

        return self.update(query, F.pad(keys.flatten(1, 2), (0, 0, 0, 1)), between)


class ReduceBlock(NeighborhoodBlock):
    """Semantic tokens gather from the image tokens around their window."""

    def forward(
        self, semantic: Tensor, x: Tensor, windows: WindowSpec, centers: Tensor | None = None
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
        spec = NeighborhoodSpec(
            query_grid=tuple(semantic.shape[1:3]),
            query_size=windows.pooled_size,
            key_grid=tuple(grid),
            stride=size,
            size=self.key_size,
            hidden=tuple(-side % size for side in grid),
            pad_mask=windows.pad_mask,
        )
        return self.look_around(semantic, x, spec)


class PoolBlock(ReduceBlock):
    """The first of the two reductions: it also makes the semantic tokens.

    Args:
        conv_pos: Add to the pooled tokens a depth-wise 3 x 3 convolution of them, window by window.
    """

    def __init__(self, embed_dims: int, *args, conv_pos: bool = False, **kwargs) -> None:
        super().__init__(embed_dims, *args, **kwargs)
        self.conv_pos = WindowPositionConv(embed_dims) if conv_pos else None

    def pool(self, x: Tensor, windows: WindowSpec) -> Tensor:
        """``(B, H, W, C) -> (B, rows * n, columns * n, C)``; padding takes part, as zeros."""
        x = pad_to_windows(x, windows.size)
        semantic = max_pool_windows(x, windows.size, windows.pooled_size)
        return semantic if self.conv_pos is None else self.conv_pos(semantic, windows.pooled_size)


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
        windows = window_partition(semantic, size).transpose(1, 2).unflatten(2, (size, size))
        position = self.proj(windows).flatten(2).transpose(1, 2)
        return semantic + window_reverse(position, size, grid)


class LocalBlock(SemanticBlock):
    """Self-attention among the semantic tokens of each window."""

    def forward(self, semantic: Tensor, windows: WindowSpec) -> Tensor:
        """``(B, H, W, C) -> (B, H, W, C)``, the grid of semantic tokens."""
        size, grid = windows.pooled_size, semantic.shape[1:3]

        def between(query: Tensor, key_value: Tensor) -> Tensor:
            windows = (window_partition(t, size) for t in (query, key_value))
            return window_reverse(self.attn.attend(*windows), size, grid)

        return self.update(semantic, semantic, between)


class GlobalBlock(SemanticBlock):
    """Self-attention among all semantic tokens of an image."""

    def forward(self, semantic: Tensor) -> Tensor:
        """``(B, H, W, C) -> (B, H, W, C)``, the grid of semantic tokens."""
        return self.update(semantic, semantic, self.attend_to_all)


class RecoverBlock(NeighborhoodBlock):
    """Image tokens query the semantic tokens around their window."""

    def forward(self, x: Tensor, semantic: Tensor, windows: WindowSpec) -> Tensor:
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
        spec = NeighborhoodSpec(
            query_grid=tuple(x.shape[1:3]),
            query_size=size,
            key_grid=tuple(semantic.shape[1:3]),
            stride=pooled_size,
            size=self.key_size,
            hidden=padding,
            pad_mask=pad_mask,
        )
        return self.look_around(x, semantic, spec)


def _pooled_padding(padding: int, size: int, pooled_size: int) -> int:
    """How many of a window's semantic rows are pooled from nothing but ``padding`` rows."""
    starts = (i * size // pooled_size for i in range(pooled_size))
    return sum(start >= size - padding for start in starts)


def semantic_unit(
    x: Tensor, blocks: list[nn.Module], windows: WindowSpec, centers: Tensor | None = None
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


class ClassifierPoolBlock(PoolBlock):
    """Fresh semantic tokens attend to those of their own window and to the image tokens around it.

    Args:
        shortcut: Keep the pooled tokens and add the attention to them. The released classifiers
            were trained without.
        embed_dims, num_heads, key_size, mlp_ratio, drop_path, conv_pos: As for
            :class:`~mmtoken.layers.stvit.semantic_swin.PoolBlock`.
    """

    def __init__(self, *args, shortcut: bool, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.shortcut = shortcut

    def forward(self, semantic: Tensor, x: Tensor, windows: WindowSpec) -> Tensor:
        """Update semantic tokens ``(B, rows * n, columns * n, C)`` from ``x``, ``(B, H, W, C)``."""
        size, grid = windows.pooled_size, semantic.shape[1:3]
        patches = clamped_patches(tuple(x.shape[1:3]), self.key_size, windows.size, x.device)
        tokens = [semantic.flatten(1, 2), x.flatten(1, 2)]

        def between(query: Tensor, key_value: Tensor) -> Tensor:
            own, around = key_value.split([t.shape[1] for t in tokens], dim=1)
            own = window_partition(own.unflatten(1, grid), size)
            around = around.index_select(1, patches.flatten())
            around = around.view(-1, patches.shape[1], around.shape[-1])
            query = window_partition(query, size)
            return window_reverse(self.attn.attend(query, torch.cat([own, around], 1)), size, grid)

        return self.update(semantic, torch.cat(tokens, dim=1), between, self.shortcut)


@cache_by_shape
def clamped_patches(
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


class GlobalReduceBlock(SemanticBlock):
    """Semantic tokens attend to themselves and to all image tokens."""

    def forward(
        self, semantic: Tensor, x: Tensor, windows: WindowSpec, centers: Tensor | None = None
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


class GlobalRecoverBlock(SemanticBlock):
    """Image tokens query all semantic tokens."""

    def forward(self, x: Tensor, semantic: Tensor, windows: WindowSpec) -> Tensor:
        """Update image tokens ``(B, H, W, C)`` from ``semantic``, ``(B, h, w, C)``."""
        return self.update(x, semantic, self.attend_to_all)


CENTER_WINDOWS = 2  # windows on a side of the grid that learned centers are laid out for


class SemanticStage(nn.Module):
    """Units of six blocks on semantic tokens, in one flat list as in the official checkpoints.

    Args:
        units: Six blocks each.
        windows: How the stage is cut.
        centers: Channels of the learned centers of the first unit; None for none.
        downsample: Leads to the next stage; None after the last.
        with_cp: Recompute activations in backward, unit by unit.
    """

    def __init__(
        self,
        units: Sequence[Sequence[nn.Module]],
        windows: WindowSpec,
        centers: int | None,
        downsample: nn.Module | None,
        with_cp: bool,
    ) -> None:
        super().__init__()
        self.windows = windows
        self.with_cp = with_cp
        if centers is not None:
            length = (CENTER_WINDOWS * windows.pooled_size) ** 2
            self.semantic_token2 = nn.Parameter(torch.zeros(1, length, centers))
            trunc_normal_(self.semantic_token2, std=0.02)
        else:
            self.semantic_token2 = None
        self.blocks = nn.ModuleList(block for unit in units for block in unit)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """``(B, H, W, C) -> (B, H, W, C)``; the caller downsamples."""
        for j in range(0, len(self.blocks), UNIT_DEPTH):
            unit = list(self.blocks[j : j + UNIT_DEPTH])
            centers = self.centers(x.shape[1:3]) if j == 0 else None
            x = run_block(semantic_unit, x, unit, self.windows, centers, recompute=self.with_cp)
        return x

    def centers(self, grid: Sequence[int]) -> Tensor | None:
        """Learned centers, resampled to the semantic tokens of a grid: ``(1, h, w, C)``."""
        if self.semantic_token2 is None:
            return None
        size, pooled_size, _ = self.windows
        grid = tuple(-(-side // size) * pooled_size for side in grid)
        old = (CENTER_WINDOWS * pooled_size,) * 2
        return resample(self.semantic_token2, old, grid, 'bicubic', True)


def dense_unit(
    common: dict,
    drop_path: Sequence[float],
    windows: WindowSpec,
    key_sizes: Sequence[int],
    conv_pos: bool,
) -> list[nn.Module]:
    """The six blocks of a unit for dense prediction: attention reaches the neighborhood.

    Args:
        common: Arguments of every block.
        drop_path: Stochastic depth rates of the six.
        windows: How the stage is cut.
        key_sizes: Sides of the patches that pool, reduce and recover block attend to, in tokens.
        conv_pos: See :class:`~mmtoken.layers.stvit.semantic_swin.PoolBlock`.
    """
    rates, (near, far, recover) = drop_path, key_sizes
    return [
        SwinBlock(window_size=windows.size, drop_path=rates[0], **common),
        PoolBlock(key_size=near, conv_pos=conv_pos, drop_path=rates[1], **common),
        ReduceBlock(key_size=far, drop_path=rates[2], **common),
        LocalBlock(drop_path=rates[3], **common),
        GlobalBlock(drop_path=rates[4], **common),
        RecoverBlock(key_size=recover, drop_path=rates[5], **common),
    ]


def classification_unit(
    common: dict,
    drop_path: Sequence[float],
    windows: WindowSpec,
    conv_pos: bool,
    shortcut: bool,
) -> list[nn.Module]:
    """The six blocks of a unit for classification: attention reaches the whole image.

    The pool block's patch is half a window wider than its window, 10 tokens for windows of 7.
    Arguments as for :func:`dense_unit`; ``shortcut`` as for
    :class:`~mmtoken.layers.stvit.semantic_swin.ClassifierPoolBlock`.
    """
    rates, near = drop_path, windows.size + windows.size // 2
    pool = dict(key_size=near, conv_pos=conv_pos, shortcut=shortcut, drop_path=rates[1])
    return [
        SwinBlock(window_size=windows.size, drop_path=rates[0], **common),
        ClassifierPoolBlock(**pool, **common),
        GlobalReduceBlock(drop_path=rates[2], **common),
        LocalBlock(drop_path=rates[3], **common),
        GlobalBlock(drop_path=rates[4], **common),
        GlobalRecoverBlock(drop_path=rates[5], **common),
    ]
