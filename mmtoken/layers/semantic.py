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

    def normed_with_padding(self, x: Tensor) -> Tensor:
        """Normalised tokens of a grid, then the padding token: ``(B, H, W, C) -> (B, HW + 1, C)``.

        Padding is added before the norm, so it is what a zero becomes there: the norm's bias.
        """
        padding = self.norm1.bias.to(x.dtype).expand(x.shape[0], 1, -1)
        return torch.cat([self.norm1(x).flatten(1, 2), padding], dim=1)


class ReduceBlock(SemanticBlock):
    """Semantic tokens gather from the image tokens around their window.

    Args:
        key_size: Side of the patch of image tokens a window attends to, in tokens.
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

    def forward(self, semantic: Tensor, x: Tensor, window_size: int, pad_mask: PadMask) -> Tensor:
        """Update semantic tokens.

        Args:
            semantic: ``(B, windows * n * n, C)``, window after window.
            x: Image tokens, ``(B, H, W, C)``, any H and W.
            window_size: Window side, in image tokens.
            pad_mask: See :func:`~mmtoken.tokens.neighbourhood.plan_neighbourhoods`.
        """
        height, width = x.shape[1:3]
        plan = plan_neighbourhoods(
            (height, width), self.key_size, window_size,
            -height % window_size, -width % window_size, pad_mask, x.device, x.dtype,
        )  # fmt: skip
        update = self.attn.forward_neighbours(
            self.norm1(semantic), self.normed_with_padding(x), plan
        )
        return self.add_mlp(self.add_attention(semantic, update))


class PoolBlock(ReduceBlock):
    """The first of the two reductions: it also makes the semantic tokens.

    Args:
        conv_pos: Add to the pooled tokens a depth-wise 3 x 3 convolution of them, window by window.
    """

    def __init__(self, embed_dims: int, *args, conv_pos: bool = False, **kwargs) -> None:
        super().__init__(embed_dims, *args, **kwargs)
        self.conv_pos = WindowPositionConv(embed_dims) if conv_pos else None

    def pool(self, x: Tensor, window_size: int, semantic_size: int) -> Tensor:
        """``(B, H, W, C) -> (B, windows * semantic_size ** 2, C)``; padding counts as zeros."""
        x = pad_to_windows(x, window_size)
        semantic = max_pool_windows(x, window_size, semantic_size)
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

    def forward(self, semantic: Tensor, semantic_size: int) -> Tensor:
        """``(B, windows * semantic_size ** 2, C) -> (B, windows * semantic_size ** 2, C)``."""
        normed = self.norm1(semantic).reshape(-1, semantic_size**2, semantic.shape[-1])
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


class RecoverBlock(SemanticBlock):
    """Image tokens query the semantic tokens around their window.

    Args:
        key_size: Side of the patch of semantic tokens a window attends to, in semantic tokens.
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

    def forward(
        self, x: Tensor, semantic: Tensor, window_size: int, semantic_size: int, pad_mask: PadMask
    ) -> Tensor:
        """Update image tokens.

        Args:
            x: Image tokens, ``(B, H, W, C)``, any H and W.
            semantic: ``(B, windows * semantic_size ** 2, C)``, window after window.
            window_size: Window side, in image tokens.
            semantic_size: Window side, in semantic tokens.
            pad_mask: See :func:`~mmtoken.tokens.neighbourhood.plan_neighbourhoods`.
        """
        grid = x.shape[1:3]
        padding = [-side % window_size for side in grid]
        semantic_grid = [-(-side // window_size) * semantic_size for side in grid]
        semantic = merge_windows(
            semantic.reshape(-1, semantic_size**2, x.shape[-1]), semantic_size, semantic_grid
        )
        if pad_mask == 'exact':
            padding = [_pooled_padding(p, window_size, semantic_size) for p in padding]
        # The released mask takes the padding of the image tokens for that of the semantic tokens.
        plan = plan_neighbourhoods(
            tuple(semantic_grid), self.key_size, semantic_size, *padding, pad_mask,
            x.device, x.dtype,
        )  # fmt: skip
        windows = partition_windows(pad_to_windows(x, window_size), window_size)
        query = self.norm1(windows).view(x.shape[0], -1, x.shape[-1])
        update = self.attn.forward_neighbours(query, self.normed_with_padding(semantic), plan)
        update = merge_windows(update.view_as(windows), window_size, grid)
        return self.add_mlp(self.add_attention(x, update))


def _pooled_padding(padding: int, window_size: int, semantic_size: int) -> int:
    """How many of a window's semantic rows are pooled from nothing but ``padding`` rows."""
    starts = (i * window_size // semantic_size for i in range(semantic_size))
    return sum(start >= window_size - padding for start in starts)


def semantic_unit(
    x: Tensor, blocks: list[nn.Module], window_size: int, semantic_size: int, pad_mask: PadMask
) -> Tensor:
    """Run one unit of six blocks.

    Args:
        x: Image tokens, ``(B, H, W, C)``, any H and W.
        blocks: Swin, pool, reduce, local, global and recover block.
        window_size: Window side, in image tokens.
        semantic_size: Window side, in semantic tokens.
        pad_mask: See :func:`~mmtoken.tokens.neighbourhood.plan_neighbourhoods`.

    Returns:
        Image tokens, ``(B, H, W, C)``.
    """
    swin, pool, reduce, mix_local, mix_global, recover = blocks
    x = swin(x)
    semantic = pool.pool(x, window_size, semantic_size)
    semantic = pool(semantic, x, window_size, pad_mask)
    semantic = reduce(semantic, x, window_size, pad_mask)
    semantic = mix_local(semantic, semantic_size)
    semantic = mix_global(semantic)
    return recover(x, semantic, window_size, semantic_size, pad_mask)
