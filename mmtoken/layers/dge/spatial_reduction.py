"""PVT's attention, whose keys and values are those of patches.

Source: PVT, arXiv 2102.12122, section 3.3. Parameter names are the official ones.
"""

from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..common.attention import varlen_cross_attention
from ..common.regions import CellSet, RegionLayout
from ..common.rotary import rotate


class SpatialReductionAttention(nn.Module):
    """Attention of packed queries; a strided convolution reduces the map of keys and values.

    Args:
        embed_dims: Channels, C.
        num_heads: Attention heads.
        sr_ratio: Side of the patch that becomes one key, in tokens; 1 keeps every token.
        qkv_bias: Biases of queries, keys and values.
        qk_norm: As for :class:`~mmtoken.layers.common.vit.Attention`.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        sr_ratio: int = 1,
        qkv_bias: bool = True,
        qk_norm: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.sr_ratio = sr_ratio
        self.q = nn.Linear(embed_dims, embed_dims, bias=qkv_bias)
        self.kv = nn.Linear(embed_dims, 2 * embed_dims, bias=qkv_bias)
        self.proj = nn.Linear(embed_dims, embed_dims)
        self.q_norm = self.k_norm = None
        if qk_norm is not None:
            self.q_norm, self.k_norm = (qk_norm(embed_dims // num_heads) for _ in range(2))
        if sr_ratio > 1:
            self.sr = nn.Conv2d(embed_dims, embed_dims, sr_ratio, sr_ratio)
            self.norm = nn.LayerNorm(embed_dims)  # eps 1e-5, unlike the norms of the block

    def keys(self, x: Tensor, layout: RegionLayout) -> Tensor:
        """Keys and values of a map.

        Args:
            x: Normalized tokens, ``(B, N, C)``. There may be prefix tokens if ``sr_ratio`` is 1.
            layout: Of the grid, which is padded with zeros at the bottom and right to whole
                patches.

        Returns:
            ``(B, 2, heads, K, d)``.
        """
        if self.sr_ratio > 1:
            x = self.norm(self.reduce(x.unflatten(1, layout.grid)).flatten(1, 2))  # B, K, C
        kv = self.kv(x).unflatten(-1, (2, self.num_heads, -1))  # B, K, 2, heads, d
        if self.k_norm is not None or layout.rotation is not None:
            key, value = kv.unbind(2)
            key = key if self.k_norm is None else self.k_norm(key)
            if layout.rotation is not None:
                key = rotate(key, layout.rotation.of(slice(x.shape[1])))
            kv = torch.stack([key, value], dim=2)
        return kv.permute(0, 2, 3, 1, 4).contiguous()

    def reduce(self, x: Tensor) -> Tensor:
        """``(B, H, W, C) -> (B, ceil(H / sr_ratio), ceil(W / sr_ratio), C)``."""
        height, width = x.shape[1:3]
        x = F.pad(x, (0, 0, 0, -width % self.sr_ratio, 0, -height % self.sr_ratio))
        return self.sr(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    def forward(self, queries: Tensor, keys: Tensor, cells: CellSet) -> Tensor:
        """Attend.

        Args:
            queries: Packed and normalized, ``(M, C)``.
            keys: From :meth:`keys`.
            cells: The cells of the queries.

        Returns:
            ``(M, C)``.
        """
        query = self.q(queries).unflatten(-1, (self.num_heads, -1))  # M, heads, d
        query = query if self.q_norm is None else self.q_norm(query)
        layout = cells.layout
        if layout.rotation is not None:
            query = rotate(query, layout.rotation.of(cells.cells % layout.num_cells_total))
        key, value = keys.unbind(1)  # B, heads, K, d
        return self.proj(varlen_cross_attention(query, key, value, cells.lengths).flatten(1))
