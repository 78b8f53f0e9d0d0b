"""Semantic tokens on Swin: pool each window, run blocks on the pooled tokens, recover the rest.

A unit of six blocks replaces six Swin blocks::

    image tokens    x --Swin--+-----------+------------------------------+--> recover --> x
                              |           |                              |
    semantic tokens           +--> pool --+--> reduce --> local --> global

Each window of the image tokens is max-pooled to a few semantic tokens, which attend to the image
tokens around them (*pool*, *reduce*), then to each other (*local*, *global*). At the end the image
tokens query the semantic tokens (*recover*). In between, image tokens are not updated: four of six
blocks run on 9 tokens a window instead of 49.

Source: STViT-R, arXiv 2303.08685; released detection backbone,
github.com/changsn/STViT-R-Object-Detection, and classifier, github.com/changsn/STViT-R (MIT).
Parameter names are the official ones. The release normalizes and projects a token once for every
patch that contains it (up to 81 times); here keys and values are computed once per token, which
gives the same result.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn as nn
from timm.layers import DropPath, Mlp, trunc_normal_
from torch import Tensor

from ...runtime.decisions import record_rectangles
from ..common.attention import cross_attention
from ..common.cache import cache_by_shape
from ..common.positions import resample
from ..common.swin import SwinBlock
from ..common.utils import ceil_div, run_block
from ..common.vit import CrossAttention
from ..common.windows import max_pool_windows, pad_to_windows, window_partition, window_reverse
from .groups import record_attended
from .neighborhood import Attend, NeighborhoodSpec, PadMask, attend_to_neighborhood

UNIT_DEPTH = 6
CENTER_WINDOWS = 2  # windows on a side of the grid that learned centers are laid out for


class SemanticAttention(CrossAttention):
    """Multi-head attention whose caller decides which tokens each query attends to."""

    def forward(self, query: Tensor, tokens: Tensor, attend: Attend) -> Tensor:
        """``(..., C) -> (..., C)``, in the shape of ``query``."""
        return self.proj(attend(self.q(query), self.kv(tokens), self.num_heads))


class SemanticBlock(nn.Module):
    """Attention and MLP with LayerScale: each of the five blocks behind the Swin block.

    One LayerNorm serves queries and keys.

    Args:
        embed_dims: Channels.
        num_heads: Attention heads.
        mlp_ratio: Hidden width of the MLP over ``embed_dims``.
        drop_path: Stochastic depth rate.
        shortcut: Add attention to the queries; without, it replaces them.
        conv_pos: Position convolution of the tokens that :func:`pool_windows` makes; None for none.

    Example:
        >>> block, semantic = SemanticBlock(32, num_heads=2), torch.zeros(1, 6, 9, 32)
        >>> block(semantic, semantic, attend_to_all).shape
        torch.Size([1, 6, 9, 32])
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        shortcut: bool = True,
        conv_pos: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.shortcut = shortcut
        self.conv_pos = conv_pos
        self.layer_scale_1 = nn.Parameter(torch.full((embed_dims,), 1e-5))
        self.layer_scale_2 = nn.Parameter(torch.full((embed_dims,), 1e-5))
        self.norm1 = nn.LayerNorm(embed_dims)
        self.attn = SemanticAttention(embed_dims, num_heads)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(embed_dims)
        self.mlp = Mlp(embed_dims, int(embed_dims * mlp_ratio))

    def forward(self, query: Tensor, tokens: Tensor, attend: Attend) -> Tensor:
        """Update the queries.

        Args:
            query: Not normalized, ``(..., C)``.
            tokens: What they attend to, not normalized, ``(..., C)``.
            attend: Which of the tokens each query attends to, such as :func:`attend_to_all`.

        Returns:
            In the shape of ``query``.
        """
        update = self.layer_scale_1 * self.attn(self.norm1(query), self.norm1(tokens), attend)
        x = query + self.drop_path(update) if self.shortcut else update
        return x + self.drop_path(self.layer_scale_2 * self.mlp(self.norm2(x)))


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


class WindowSpec(NamedTuple):
    """How a stage is divided into windows.

    Attributes:
        size: Window side, in image tokens.
        pooled_size: Window side, in semantic tokens.
        pad_mask: Which padding attention must not see, see
            :class:`~mmtoken.layers.stvit.neighborhood.NeighborhoodSpec`.
    """

    size: int
    pooled_size: int
    pad_mask: PadMask

    def pooled_grid(self, grid: Sequence[int]) -> tuple[int, int]:
        """``(h, w)`` of the semantic tokens of a grid ``(H, W)`` of image tokens."""
        return tuple(ceil_div(side, self.size) * self.pooled_size for side in grid)


# Reduce: image tokens to semantic tokens.


def pool_windows(x: Tensor, windows: WindowSpec, conv_pos: nn.Module | None) -> Tensor:
    """Max-pool each window of the image tokens to semantic tokens.

    Padding takes part, as zeros.

    Args:
        x: Image tokens, ``(B, H, W, C)``, any H and W.
        windows: How the stage is divided.
        conv_pos: From the pool block; None for none.

    Returns:
        Semantic tokens, ``(B, h, w, C)``.
    """
    size, pooled = windows.size, windows.pooled_size
    record_rectangles(
        'pooled to semantic tokens',
        x.shape[0],
        tuple(x.shape[1:3]),
        lambda place, _: place * pooled // size,
    )
    x = pad_to_windows(x, size)
    semantic = max_pool_windows(x, size, pooled)
    return semantic if conv_pos is None else conv_pos(semantic, pooled)


def patches_of_image(x: Tensor, windows: WindowSpec, patch_size: int) -> tuple[Tensor, Attend]:
    """Semantic tokens attend to the image tokens around their window.

    Args:
        x: Image tokens, ``(B, H, W, C)``.
        windows: How the stage is divided.
        patch_size: Side of the patch around a window, in image tokens.

    Returns:
        As :func:`~mmtoken.layers.stvit.neighborhood.attend_to_neighborhood`.
    """
    grid = tuple(x.shape[1:3])
    spec = NeighborhoodSpec(
        query_grid=windows.pooled_grid(grid),
        query_window_size=windows.pooled_size,
        key_grid=grid,
        key_window_size=windows.size,
        patch_size=patch_size,
        padded_hw=tuple(-side % windows.size for side in grid),
        pad_mask=windows.pad_mask,
    )
    return attend_to_neighborhood(x, spec)


# Recover: semantic tokens to image tokens.


def patches_of_semantic(
    semantic: Tensor, windows: WindowSpec, patch_size: int, grid: Sequence[int]
) -> tuple[Tensor, Attend]:
    """Image tokens attend to the semantic tokens around their window.

    Args:
        semantic: Semantic tokens, ``(B, h, w, C)``.
        windows: How the stage is divided.
        patch_size: Side of the patch around a window, in semantic tokens.
        grid: ``(H, W)`` of the image tokens.

    Returns:
        As :func:`~mmtoken.layers.stvit.neighborhood.attend_to_neighborhood`.
    """
    # The released mask takes the padding of the image tokens for that of the semantic tokens.
    padded = tuple(-side % windows.size for side in grid)
    if windows.pad_mask == 'exact':
        padded = tuple(_pooled_padding(rows, windows) for rows in padded)
    spec = NeighborhoodSpec(
        query_grid=tuple(grid),
        query_window_size=windows.size,
        key_grid=tuple(semantic.shape[1:3]),
        key_window_size=windows.pooled_size,
        patch_size=patch_size,
        padded_hw=padded,
        pad_mask=windows.pad_mask,
    )
    return attend_to_neighborhood(semantic, spec)


def _pooled_padding(padding: int, windows: WindowSpec) -> int:
    """How many of a window's semantic rows are pooled from nothing but ``padding`` rows."""
    starts = (i * windows.size // windows.pooled_size for i in range(windows.pooled_size))
    return sum(start >= windows.size - padding for start in starts)


# Attention of queries (B, H, W, C) to keys and values (..., 2 * C).


def attend_to_all(query: Tensor, key_value: Tensor, num_heads: int) -> Tensor:
    """Every query attends to all tokens of its image."""
    query_tokens, key_tokens = query.flatten(1, 2), key_value.flatten(1, -2)
    return cross_attention(query_tokens, key_tokens, num_heads).view_as(query)


def attend_in_windows(query: Tensor, key_value: Tensor, num_heads: int, size: int) -> Tensor:
    """Every query attends to its own window of ``size * size`` tokens."""
    windows = (window_partition(t, size) for t in (query, key_value))
    return window_reverse(cross_attention(*windows, num_heads), size, query.shape[1:3])


def attend_to_window_and_patch(
    query: Tensor, key_value: Tensor, num_heads: int, size: int, patches: Tensor
) -> Tensor:
    """Semantic tokens attend to their own window and to a patch of the image tokens.

    Args:
        query: ``(B, h, w, C)``.
        key_value: Of the semantic tokens and then of the image tokens,
            ``(B, h * w + H * W, 2 * C)``.
        num_heads: Attention heads.
        size: Window side, in semantic tokens.
        patches: From :func:`clamped_patches`, ``(windows, K)``.

    Returns:
        ``(B, h, w, C)``.
    """
    grid = query.shape[1:3]
    num_semantic = grid[0] * grid[1]
    own = window_partition(key_value[:, :num_semantic].unflatten(1, grid), size)
    around = key_value[:, num_semantic:].index_select(1, patches.flatten())
    around = around.view(-1, patches.shape[1], around.shape[-1])  # (B * windows, K, 2 * C)
    key_value = torch.cat([own, around], dim=1)
    attended = cross_attention(window_partition(query, size), key_value, num_heads)
    return window_reverse(attended, size, grid)


@cache_by_shape
def clamped_patches(
    grid: tuple[int, int], size: int, stride: int, device: torch.device | str = 'cpu'
) -> Tensor:
    """The patch around each window, moved to lie inside the grid: ``(windows, K)``.

    Args:
        grid: ``(H, W)``, in tokens, without padding.
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


# The two forms of a unit.


def dense_unit(
    x: Tensor,
    blocks: Sequence[nn.Module],
    centers: Tensor | None,
    windows: WindowSpec,
    key_sizes: Sequence[int],
) -> Tensor:
    """Run a unit for dense prediction: attention reaches the neighborhood of a window.

    Args:
        x: Image tokens, ``(B, H, W, C)``, any H and W.
        blocks: Swin, pool, reduce, local, global and recover block.
        centers: Learned tokens that the reduce block adds to its own, ``(1, h, w, C)``, or None.
        windows: How the stage is divided.
        key_sizes: Sides of the patches that the pool, reduce and recover block attend to.

    Returns:
        Image tokens, ``(B, H, W, C)``.
    """
    swin, pool, reduce, mix_local, mix_global, recover = blocks
    near, far, recover_size = key_sizes
    in_windows = partial(attend_in_windows, size=windows.pooled_size)
    x = swin(x)
    semantic = pool_windows(x, windows, pool.conv_pos)  # (B, h, w, C)
    semantic = pool(semantic, *patches_of_image(x, windows, near))
    if centers is not None:
        semantic = semantic + centers
    semantic = reduce(semantic, *patches_of_image(x, windows, far))
    semantic = mix_local(semantic, semantic, in_windows)
    semantic = mix_global(semantic, semantic, attend_to_all)
    grid = tuple(x.shape[1:3])
    semantic, in_patches = patches_of_semantic(semantic, windows, recover_size, grid)
    record_attended(recover, x, semantic, grid, in_patches)
    return recover(x, semantic, in_patches)


def classification_unit(
    x: Tensor, blocks: Sequence[nn.Module], centers: Tensor | None, windows: WindowSpec
) -> Tensor:
    """Run a unit for classification: attention reaches the whole image.

    Only the pool block attends to the neighborhood, a patch half a window wider than its window
    (10 tokens for windows of 7), and to the pooled tokens of its own window. Arguments are those of
    :func:`dense_unit`; the centers are added to the queries of the reduce block, not to its keys.
    """
    swin, pool, reduce, mix_local, mix_global, recover = blocks
    size, near = windows.pooled_size, windows.size + windows.size // 2
    in_windows = partial(attend_in_windows, size=size)
    x = swin(x)
    patches = clamped_patches(tuple(x.shape[1:3]), near, windows.size, x.device)
    in_window_and_patch = partial(attend_to_window_and_patch, size=size, patches=patches)
    semantic = pool_windows(x, windows, pool.conv_pos)  # (B, h, w, C)
    semantic = pool(semantic, join_tokens(semantic, x), in_window_and_patch)
    tokens = join_tokens(semantic, x)
    if centers is not None:
        semantic = semantic + centers
    semantic = reduce(semantic, tokens, attend_to_all)
    semantic = mix_local(semantic, semantic, in_windows)
    semantic = mix_global(semantic, semantic, attend_to_all)
    record_attended(recover, x, semantic, tuple(x.shape[1:3]), attend_to_all)
    return recover(x, semantic, attend_to_all)


def join_tokens(semantic: Tensor, x: Tensor) -> Tensor:
    """Both grids row by row, ``(B, h, w, C), (B, H, W, C) -> (B, h * w + H * W, C)``."""
    return torch.cat([semantic.flatten(1, 2), x.flatten(1, 2)], dim=1)


class SemanticStage(nn.Module):
    """Units of six blocks, in one flat list as in the official checkpoints.

    Args:
        block_kwargs: Arguments of every block.
        drop_path: Stochastic depth rate of each block.
        windows: How the stage is divided.
        unit: Runs the blocks of a unit, :func:`dense_unit` or :func:`classification_unit` with all
            arguments but the first three.
        shortcut: Whether pool blocks add attention to the pooled tokens.
        conv_pos: Whether pool blocks have a :class:`WindowPositionConv`.
        use_global: Whether there are learned centers for the first unit.
        downsample: Leads to the next stage; None behind the last.
        with_cp: Recompute activations in backward, unit by unit.
    """

    def __init__(
        self,
        block_kwargs: dict,
        drop_path: Sequence[float],
        windows: WindowSpec,
        unit: Callable[[Tensor, Sequence[nn.Module], Tensor | None], Tensor],
        shortcut: bool,
        conv_pos: bool,
        use_global: bool,
        downsample: nn.Module | None,
        with_cp: bool,
    ) -> None:
        super().__init__()
        self.windows = windows
        self.unit = unit
        self.with_cp = with_cp
        dims, self.semantic_token2 = block_kwargs['embed_dims'], None
        if use_global:
            length = (CENTER_WINDOWS * windows.pooled_size) ** 2
            self.semantic_token2 = nn.Parameter(torch.zeros(1, length, dims))
            trunc_normal_(self.semantic_token2, std=0.02)
        self.blocks = nn.ModuleList()
        for i, rate in enumerate(drop_path):
            kwargs = dict(block_kwargs, drop_path=rate)
            if i % UNIT_DEPTH == 0:
                block = SwinBlock(window_size=windows.size, **kwargs)
            elif i % UNIT_DEPTH == 1:
                position = WindowPositionConv(dims) if conv_pos else None
                block = SemanticBlock(shortcut=shortcut, conv_pos=position, **kwargs)
            else:
                block = SemanticBlock(**kwargs)
            self.blocks.append(block)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """``(B, H, W, C) -> (B, H, W, C)``; the caller downsamples."""
        for i in range(0, len(self.blocks), UNIT_DEPTH):
            blocks = list(self.blocks[i : i + UNIT_DEPTH])
            centers = self.centers(x.shape[1:3]) if i == 0 else None
            x = run_block(self.unit, x, blocks, centers, recompute=self.with_cp)
        return x

    def centers(self, grid: Sequence[int]) -> Tensor | None:
        """Learned centers, resampled to the semantic tokens of a grid: ``(1, h, w, C)``."""
        if self.semantic_token2 is None:
            return None
        old = (CENTER_WINDOWS * self.windows.pooled_size,) * 2
        return resample(self.semantic_token2, old, self.windows.pooled_grid(grid), 'bicubic', True)
