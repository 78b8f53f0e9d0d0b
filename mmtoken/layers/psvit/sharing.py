"""Blocks that share attention maps, in groups, and a stage of them.

Source: PSViT, arXiv 2108.03428. A layer that shares multiplies its own values by the map
``A = softmax(q k^T / sqrt(d))`` of another layer. Parameter names are timm's; ``attn.v`` is the
last third of ``attn.qkv`` there.
"""

from collections.abc import Callable, Sequence

import torch.nn as nn
from torch import Tensor

from ...runtime.reference import on_reference_path
from ..common.attention import attention, attention_map
from ..common.utils import run_block
from ..common.vit import Attention, ViTBlock
from .windows import RaggedWindows, divide_into_windows


class SharedMap:
    """The attention map of a group of blocks, inside each window.

    The map itself is not kept, but the queries and keys that it is made of: each block computes it
    again inside fused attention. That is the same arithmetic, is as fast as to read a map back from
    memory, and needs no memory for it. On the reference path the map is kept.

    Args:
        windows: Of the tokens, which are ordered by them.
    """

    def __init__(self, windows: RaggedWindows) -> None:
        self.windows = windows
        self.pairs: list[tuple[Tensor, Tensor]] = []
        self.maps: list[Tensor] = []

    def compute(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of the first block, ``(B, N, heads, d)`` each to ``(B, N, heads, d)``."""
        self.pairs = list(zip(self.windows.split(query), self.windows.split(key), strict=True))
        if on_reference_path():
            self.maps = [attention_map(q, k) for q, k in self.pairs]
        return self.reuse(value)

    def reuse(self, value: Tensor) -> Tensor:
        """Attention of a further block: ``(B, N, heads, d) -> (B, N, heads, d)``."""
        values = self.windows.split(value)
        if self.maps:
            out = [a.to(v.dtype) @ v for a, v in zip(self.maps, values, strict=True)]
        else:
            out = [attention(q, k, v) for (q, k), v in zip(self.pairs, values, strict=True)]
        return self.windows.join(out)


class ValueOnlyAttention(nn.Module):
    """Attention with the map of another layer: it projects values and outputs alone.

    Args:
        embed_dims: Channels, C.
        num_heads: Attention heads.
        qkv_bias: Bias of values.
    """

    def __init__(self, embed_dims: int, num_heads: int, qkv_bias: bool = True) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.v = nn.Linear(embed_dims, embed_dims, bias=qkv_bias)
        self.proj = nn.Linear(embed_dims, embed_dims)

    def forward(self, x: Tensor, attn_fn: Callable[[Tensor], Tensor]) -> Tensor:
        """``(..., C) -> (..., C)``; ``attn_fn`` multiplies values by the map."""
        value = self.v(x).unflatten(-1, (self.num_heads, -1))
        return self.proj(attn_fn(value).flatten(-2))


class SharingStage(nn.Module):
    """Blocks on a grid of one size, in groups that share an attention map.

    Args:
        embed_dims: Channels, C.
        num_heads: Attention heads.
        groups: Blocks of each group. The first of a group is a
            plain :class:`~mmtoken.layers.common.vit.ViTBlock`, the others project values alone.
        feedforward_channels: Hidden channels of the MLPs.
        qkv_bias: Biases of queries, keys and values.
        drop_path: Stochastic depth rate of each block; none by default.
        window_size: Side of the windows that limit attention, in tokens; None for global attention.
        pool: Makes the tokens of this stage from those of the previous one; None for nothing.
        with_cp: Recompute activations in backward, group by group.

    Example:
        >>> import torch
        >>> stage = SharingStage(32, num_heads=2, groups=(2, 1), feedforward_channels=64)
        >>> stage(torch.zeros(1, 5, 7, 32)).shape
        torch.Size([1, 5, 7, 32])
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        groups: Sequence[int],
        feedforward_channels: int,
        qkv_bias: bool = True,
        drop_path: Sequence[float] = (),
        window_size: int | None = None,
        pool: nn.Module | None = None,
        with_cp: bool = False,
    ) -> None:
        super().__init__()
        self.groups = tuple(groups)
        self.window_size = window_size
        self.with_cp = with_cp
        self.pool = pool or nn.Identity()
        attns = [attn for n in groups for attn in (Attention, *[ValueOnlyAttention] * (n - 1))]
        rates = drop_path or [0.0] * len(attns)
        self.blocks = nn.ModuleList(
            ViTBlock(embed_dims, num_heads, feedforward_channels, qkv_bias, rate, attn=attn)
            for attn, rate in zip(attns, rates, strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Run the blocks.

        Args:
            x: Tokens on a grid, ``(B, H, W, C)``, any H and W; those of the previous stage if there
                is a ``pool``.

        Returns:
            ``(B, H, W, C)``, with H and W as ``pool`` makes them.
        """
        x = self.pool(x)
        grid = (x.shape[1], x.shape[2])
        windows = divide_into_windows(grid, self.window_size, x.device)
        x = self.run(windows.to_windows(x.flatten(1, 2)), windows)  # (B, N, C)
        return windows.to_grid(x).unflatten(1, grid)

    def run(self, x: Tensor, windows: RaggedWindows) -> Tensor:
        """The blocks, on tokens ordered by windows: ``(B, N, C) -> (B, N, C)``."""
        start = 0
        for size in self.groups:
            blocks = self.blocks[start : start + size]
            x = run_block(self.run_group, blocks, x, windows, recompute=self.with_cp)
            start += size
        return x

    def run_group(self, blocks: nn.ModuleList, x: Tensor, windows: RaggedWindows) -> Tensor:
        """Blocks that share the map of the first: ``(B, N, C) -> (B, N, C)``."""
        shared = SharedMap(windows)
        for i, block in enumerate(blocks):
            x = block(x, shared.reuse if i else shared.compute)
        return x
