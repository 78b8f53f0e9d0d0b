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

from typing import NamedTuple

import torch
import torch.nn as nn
from timm.layers import DropPath, Mlp
from torch import Tensor

from ..tokens.attention import attention, join_heads, split_heads
from ..tokens.neighbourhood import (
    Neighbourhoods,
    PadMask,
    neighbourhood_attention,
    plan_neighbourhoods,
)
from ..tokens.windows import (
    max_pool_windows,
    merge_windows,
    pad_to_windows,
    partition_windows,
)

UNIT_DEPTH = 6


class Windowing(NamedTuple):
    """How a stage is cut into windows.

    Attributes:
        size: Window side, in image tokens.
        pooled_size: Window side, in semantic tokens.
        pad_mask: Which padding attention must not see, see
            :func:`~mmtoken.tokens.neighbourhood.plan_neighbourhoods`.
    """

    size: int
    pooled_size: int
    pad_mask: PadMask


class CrossAttention(nn.Module):
    """Projections of multi-head attention whose queries and keys are different tokens."""

    def __init__(self, embed_dims: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(embed_dims, embed_dims)
        self.kv = nn.Linear(embed_dims, 2 * embed_dims)
        self.proj = nn.Linear(embed_dims, embed_dims)

    def forward(self, query: Tensor, tokens: Tensor) -> Tensor:
        """Attend to all tokens: ``(B, Q, C), (B, K, C) -> (B, Q, C)``."""
        key, value = self.kv(tokens).chunk(2, dim=-1)
        query, key, value = (split_heads(t, self.num_heads) for t in (self.q(query), key, value))
        return self.proj(join_heads(attention(query, key, value)))

    def forward_neighbours(self, query: Tensor, tokens: Tensor, plan: Neighbourhoods) -> Tensor:
        """Attend to the patch around each window.

        Args:
            query: ``(B, windows * Q, C)``, window after window.
            tokens: ``(B, plan.num_tokens + 1, C)``, the padding token last.
            plan: Which tokens each window attends to.
        """
        key, value = self.kv(tokens).chunk(2, dim=-1)
        out = neighbourhood_attention(self.q(query), key, value, plan, self.num_heads)
        return self.proj(out)


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

    def add_attention(self, x: Tensor, update: Tensor) -> Tensor:
        return x + self.drop_path(self.layer_scale_1 * update)

    def add_mlp(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.layer_scale_2 * self.mlp(self.norm2(x)))


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

    def attend(
        self, query: Tensor, grid: Tensor, stride: int, hidden: list[int], pad_mask: PadMask
    ) -> Tensor:
        """Attend from each window to the patch around it.

        Args:
            query: Normalised, ``(B, windows * Q, C)``, window after window.
            grid: Where the keys come from, ``(B, H, W, C)``, not normalised.
            stride: Side of a window on that grid, in tokens.
            hidden: Trailing rows and columns of the padded grid that the mask is about, in tokens.
            pad_mask: See :func:`~mmtoken.tokens.neighbourhood.plan_neighbourhoods`.
        """
        plan = plan_neighbourhoods(
            tuple(grid.shape[1:3]), self.key_size, stride, *hidden, pad_mask,
            grid.device, grid.dtype,
        )  # fmt: skip
        return self.attn.forward_neighbours(query, self.normed_with_padding(grid), plan)

    def normed_with_padding(self, grid: Tensor) -> Tensor:
        """Normalised tokens of a grid, then the padding token: ``(B, H, W, C) -> (B, HW + 1, C)``.

        Padding is added before the norm, so it is what a zero becomes there: the norm's bias.
        """
        padding = self.norm1.bias.to(grid.dtype).expand(grid.shape[0], 1, -1)
        return torch.cat([self.norm1(grid).flatten(1, 2), padding], dim=1)


class ReduceBlock(NeighbourhoodBlock):
    """Semantic tokens gather from the image tokens around their window."""

    def forward(self, semantic: Tensor, x: Tensor, windows: Windowing) -> Tensor:
        """Update semantic tokens.

        Args:
            semantic: ``(B, windows * n * n, C)``, window after window.
            x: Image tokens, ``(B, H, W, C)``, any H and W.
            windows: How the stage is cut.
        """
        padding = [-side % windows.size for side in x.shape[1:3]]
        update = self.attend(self.norm1(semantic), x, windows.size, padding, windows.pad_mask)
        return self.add_mlp(self.add_attention(semantic, update))


class PoolBlock(ReduceBlock):
    """The first of the two reductions: it also makes the semantic tokens.

    Args:
        conv_pos: Add to the pooled tokens a depth-wise 3 x 3 convolution of them, window by window.
    """

    def __init__(self, embed_dims: int, *args, conv_pos: bool = False, **kwargs) -> None:
        super().__init__(embed_dims, *args, **kwargs)
        self.conv_pos = WindowPositionConv(embed_dims) if conv_pos else None

    def pool(self, x: Tensor, windows: Windowing) -> Tensor:
        """``(B, H, W, C) -> (B, windows * n * n, C)``; padding takes part, as zeros."""
        x = pad_to_windows(x, windows.size)
        semantic = max_pool_windows(x, windows.size, windows.pooled_size)
        if self.conv_pos is not None:
            semantic = self.conv_pos(semantic)
        return semantic.reshape(x.shape[0], -1, x.shape[-1])


class WindowPositionConv(nn.Module):
    """Depth-wise 3 x 3 convolution inside each window of semantic tokens, added to them."""

    def __init__(self, embed_dims: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.Conv2d(embed_dims, embed_dims, 3, padding=1, groups=embed_dims)
        )

    def forward(self, semantic: Tensor) -> Tensor:
        """``(B * windows, n * n, C) -> (B * windows, n * n, C)``."""
        side = int(semantic.shape[1] ** 0.5)
        x = semantic.transpose(1, 2).unflatten(2, (side, side))
        return semantic + self.proj(x).flatten(2).transpose(1, 2)


class LocalBlock(SemanticBlock):
    """Self-attention among the semantic tokens of each window."""

    def forward(self, semantic: Tensor, windows: Windowing) -> Tensor:
        """``(B, windows * n * n, C) -> (B, windows * n * n, C)``."""
        normed = self.norm1(semantic).reshape(-1, windows.pooled_size**2, semantic.shape[-1])
        update = self.attn(normed, normed).view_as(semantic)
        return self.add_mlp(self.add_attention(semantic, update))


class GlobalBlock(SemanticBlock):
    """Self-attention among all semantic tokens of an image.

    There is no position term, so the tokens need not be put back in the order of their grid.
    """

    def forward(self, semantic: Tensor) -> Tensor:
        """``(B, N, C) -> (B, N, C)``."""
        normed = self.norm1(semantic)
        return self.add_mlp(self.add_attention(semantic, self.attn(normed, normed)))


class RecoverBlock(NeighbourhoodBlock):
    """Image tokens query the semantic tokens around their window."""

    def forward(self, x: Tensor, semantic: Tensor, windows: Windowing) -> Tensor:
        """Update image tokens.

        Args:
            x: Image tokens, ``(B, H, W, C)``, any H and W.
            semantic: ``(B, windows * n * n, C)``, window after window.
            windows: How the stage is cut.
        """
        size, pooled_size, pad_mask = windows
        grid, channels = x.shape[1:3], x.shape[-1]
        # The released mask takes the padding of the image tokens for that of the semantic tokens.
        padding = [-side % size for side in grid]
        if pad_mask == 'exact':
            padding = [_pooled_padding(p, size, pooled_size) for p in padding]
        semantic = merge_windows(
            semantic.reshape(-1, pooled_size**2, channels),
            pooled_size,
            [-(-side // size) * pooled_size for side in grid],
        )
        query = partition_windows(pad_to_windows(x, size), size)
        query = self.norm1(query).view(x.shape[0], -1, channels)
        update = self.attend(query, semantic, pooled_size, padding, pad_mask)
        update = merge_windows(update.reshape(-1, size**2, channels), size, grid)
        return self.add_mlp(self.add_attention(x, update))


def _pooled_padding(padding: int, size: int, pooled_size: int) -> int:
    """How many of a window's semantic rows are pooled from nothing but ``padding`` rows."""
    starts = (i * size // pooled_size for i in range(pooled_size))
    return sum(start >= size - padding for start in starts)


def semantic_unit(x: Tensor, blocks: list[nn.Module], windows: Windowing) -> Tensor:
    """Run one unit of six blocks.

    Args:
        x: Image tokens, ``(B, H, W, C)``, any H and W.
        blocks: Swin, pool, reduce, local, global and recover block.
        windows: How the stage is cut.

    Returns:
        Image tokens, ``(B, H, W, C)``.
    """
    swin, pool, reduce, mix_local, mix_global, recover = blocks
    x = swin(x)
    semantic = pool.pool(x, windows)
    semantic = pool(semantic, x, windows)
    semantic = reduce(semantic, x, windows)
    semantic = mix_local(semantic, windows)
    semantic = mix_global(semantic)
    return recover(x, semantic, windows)
