"""Attention of packed queries to a dense map, as it is or reduced.

Source: PVT, arXiv 2102.12122, section 3.3. Parameter names are the official ones.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..common.attention import varlen_cross_attention
from ..common.old_tiles import chunked_apply, tokens_per_tile, use_tiling
from ..common.plain import is_plain_conv
from ..common.regions import CellSet

# Each call of the convolution prepares its weights anew, which costs as much as a small tile.
STRIP_TILES = 8


class SpatialReductionAttention(nn.Module):
    """Multi-head attention whose keys and values are made by a strided convolution.

    Args:
        embed_dims: Channels.
        num_heads: Attention heads.
        sr_ratio: Side of the patch that becomes one key, in tokens; 1 takes every token.
        qkv_bias: Biases for queries, keys and values.
        counted_products: How many of the two products of attention, with keys and with values, the
            budget counts: one in the released PVT, two in the released DeiT.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        sr_ratio: int = 1,
        qkv_bias: bool = True,
        counted_products: int = 1,
    ) -> None:
        super().__init__()
        self.embed_dims = embed_dims
        self.counted_products = counted_products
        self.num_heads = num_heads
        self.sr_ratio = sr_ratio
        self.q = nn.Linear(embed_dims, embed_dims, bias=qkv_bias)
        self.kv = nn.Linear(embed_dims, 2 * embed_dims, bias=qkv_bias)
        self.proj = nn.Linear(embed_dims, embed_dims)
        if sr_ratio > 1:
            self.sr = nn.Conv2d(embed_dims, embed_dims, sr_ratio, sr_ratio)
            self.norm = nn.LayerNorm(embed_dims)  # eps 1e-5, unlike those of the block

    def keys(self, x: Tensor, norm: nn.Module, grid: tuple[int, int]) -> Tensor:
        """Keys and values of a dense map.

        Args:
            x: Tokens, not normalised, ``(B, N, C)``: those of the grid, with ``sr_ratio=1`` behind
                any extra ones.
            norm: The norm that comes first.
            grid: ``(H, W)``, padded with zeros at the bottom and right to whole patches.

        Returns:
            ``(B, 2, heads, K, d)``.
        """
        if self.sr_ratio == 1:
            layers = (self.kv, norm)
            kv = chunked_apply(lambda t: self.kv(norm(t)), x, training=self.training, layers=layers)
        else:
            kv = self.kv(self.norm(self.reduce(x.unflatten(1, grid), norm).flatten(1, 2)))
        kv = kv.unflatten(-1, (2, self.num_heads, -1)).permute(0, 2, 3, 1, 4)
        return kv.contiguous()

    def reduce(self, x: Tensor, norm: nn.Module) -> Tensor:
        """``(B, H, W, C) -> (B, ceil(H / sr_ratio), ceil(W / sr_ratio), C)``."""
        in_patches = is_plain_conv(self.sr, self.sr_ratio, stride=self.sr_ratio)
        if not in_patches or not use_tiling(x, self.training, norm):
            return self._convolve(norm(x))
        batch, height, width, channels = x.shape
        # Where no patch reaches from one image into the next, they can stand on top of each other.
        stacked = x.flatten(0, 1)[None] if height % self.sr_ratio == 0 else x
        strip = STRIP_TILES * tokens_per_tile(channels) // (len(stacked) * width)
        rows = self.sr_ratio * max(1, strip // self.sr_ratio)
        parts = [self._convolve(norm(part)) for part in stacked.split(rows, dim=1)]
        return torch.cat(parts, dim=1).view(batch, -1, *parts[0].shape[2:])

    def _convolve(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        x = F.pad(x, (0, 0, 0, -width % self.sr_ratio, 0, -height % self.sr_ratio))
        return self.sr(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    def forward(self, queries: Tensor, keys: Tensor, cells: CellSet) -> Tensor:
        """Attend.

        Args:
            queries: Packed and normalised, ``(M, C)``.
            keys: From :meth:`keys`.
            cells: The queries' own.

        Returns:
            ``(M, C)``.
        """
        query = self.q(queries).unflatten(-1, (self.num_heads, -1))
        key, value = keys.unbind(1)
        return self.proj(varlen_cross_attention(query, key, value, cells.lengths).flatten(1))

    def complexity(self, tokens: Tensor, queries: Tensor) -> Tensor:
        """Operations of a number of tokens and queries, as the budget counts them."""
        dims, keys = self.embed_dims, tokens / self.sr_ratio**2
        reduction = tokens * dims**2 + keys * dims if self.sr_ratio > 1 else 0
        products = queries * keys * (self.counted_products * dims + 3 * self.num_heads)
        return reduction + 2 * keys * dims**2 + 2 * queries * dims**2 + products
