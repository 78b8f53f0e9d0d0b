"""A plain ViT block on packed tokens.

Source: ViT, arXiv 2010.11929. Parameter names are timm's.
"""

from abc import abstractmethod
from collections.abc import Callable
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import DropPath, LayerScale, Mlp
from torch import Tensor

from ..tokens.plain import draws, is_plain, known_to_fast_paths
from ..tokens.tiles import tokenwise, works_in_tiles
from .cross_block import NORM_EPS

Attend = Callable[..., Tensor]


class HeadedAttention(nn.Module):
    """Multi-head attention of packed tokens; who attends to whom is the caller's.

    Subclasses have the last layer, ``proj``, and :meth:`project`.

    Args:
        embed_dims: Channels.
        num_heads: Attention heads.
    """

    def __init__(self, embed_dims: int, num_heads: int) -> None:
        super().__init__()
        self.embed_dims = embed_dims
        self.num_heads = num_heads

    def forward(self, x: Tensor, attend: Attend, follow: bool = False) -> Tensor:
        """``(M, C) -> (M, C)``; ``attend`` and ``follow`` as for :class:`PackedBlock`."""
        return self.proj(self.attend(self.project(x, follow), attend))

    def attend(self, projected: Tensor, attend: Attend) -> Tensor:
        """Attention of what :meth:`project` returns: ``(M, C)``, for the last layer."""
        heads = projected.unflatten(-1, (-1, self.num_heads, self.embed_dims // self.num_heads))
        return attend(*heads.unbind(1)).flatten(1)

    @abstractmethod
    def project(self, x: Tensor, follow: bool) -> Tensor:
        """To queries, keys and values, ``(M, 3 * C)``, or with ``follow`` to values, ``(M, C)``."""


@known_to_fast_paths
class PackedAttention(HeadedAttention):
    """Attention with one layer for queries, keys and values, as in ViT.

    Args:
        embed_dims: Channels.
        num_heads: Attention heads.
        qkv_bias: Biases for queries, keys and values.
    """

    def __init__(self, embed_dims: int, num_heads: int, qkv_bias: bool = True) -> None:
        super().__init__(embed_dims, num_heads)
        self.qkv = nn.Linear(embed_dims, 3 * embed_dims, bias=qkv_bias)
        self.proj = nn.Linear(embed_dims, embed_dims)

    def project(self, x: Tensor, follow: bool = False) -> Tensor:
        if not follow:
            return self.qkv(x)
        values = slice(2 * self.embed_dims, None)
        if not is_plain(self.qkv, nn.Linear):
            return self.qkv(x)[:, values]
        bias = None if self.qkv.bias is None else self.qkv.bias[values]
        return F.linear(x, self.qkv.weight[values], bias)


@known_to_fast_paths
class PackedBlock(nn.Module):
    """Attention and MLP, each behind a LayerNorm and with a residual.

    All but attention treats every token by itself, so images with different numbers of tokens stand
    in one row, without padding.

    Args:
        embed_dims: Channels.
        num_heads: Attention heads.
        feedforward_channels: Hidden channels of the MLP.
        qkv_bias: Biases for queries, keys and values.
        drop_path: Stochastic depth rate.
        layer_scale: Initial value of a LayerScale behind attention and MLP; None for none.
    """

    attention_type: type[nn.Module] = PackedAttention

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        feedforward_channels: int,
        qkv_bias: bool = True,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(embed_dims, NORM_EPS)
        self.attn = self.attention_type(embed_dims, num_heads, qkv_bias)
        self.norm2 = nn.LayerNorm(embed_dims, NORM_EPS)
        self.mlp = Mlp(embed_dims, feedforward_channels)
        self.drop_path = DropPath(drop_path)
        scaled = layer_scale is not None
        self.ls1 = LayerScale(embed_dims, layer_scale) if scaled else nn.Identity()
        self.ls2 = LayerScale(embed_dims, layer_scale) if scaled else nn.Identity()

    def forward(
        self, x: Tensor, attend: Attend, lengths: list[int], follow: bool = False
    ) -> Tensor:
        """Update tokens.

        Args:
            x: Packed tokens, ``(M, C)``.
            attend: Attention of queries to keys and values, all ``(M, heads, d)``.
            lengths: Tokens of each image, which stochastic depth drops as a whole.
            follow: The attention map is that of another block, and ``attend`` takes values alone.

        Returns:
            ``(M, C)``.
        """
        attn, tile = self.attn, partial(tokenwise, training=self.training, layers=(self,))
        if works_in_tiles(x, self.training, self):
            projected = tile(lambda t: attn.project(self.norm1(t), follow), x)
            attended = attn.attend(projected, attend)
            return tile(lambda t, a: self.add(t, attn.proj(a)), x, attended)
        update = attn(self.norm1(x), attend, follow)
        return self.add(x, update, *self.draw_kept(x, lengths))

    def add(self, x: Tensor, update: Tensor, *kept: Tensor) -> Tensor:
        """Add what attention gave, and then the MLP; ``kept`` is from :meth:`draw_kept`."""
        change = self.ls1(update)
        x = x + (change * kept[0] if kept else change)
        change = self.ls2(self.mlp(self.norm2(x)))
        return x + (change * kept[1] if kept else change)

    def draw_kept(self, x: Tensor, lengths: list[int]) -> list[Tensor]:
        """Stochastic depth: what attention and MLP are multiplied by, ``(M, 1)``; empty if none."""
        if not draws(self.drop_path):
            return []
        images = x.new_ones(len(lengths), 1)
        repeats = torch.tensor(lengths, device=x.device)
        return [
            self.drop_path(images).repeat_interleave(repeats, 0, output_size=len(x))
            for _ in range(2)
        ]
