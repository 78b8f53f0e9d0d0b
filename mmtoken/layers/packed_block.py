"""A plain ViT block on packed tokens.

Source: ViT, arXiv 2010.11929. Parameter names are timm's.
"""

from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import DropPath, LayerScale, Mlp
from torch import Tensor

from ..tokens.tiles import tokenwise
from .cross_block import NORM_EPS

Attend = Callable[..., Tensor]


class PackedAttention(nn.Module):
    """The projections of multi-head self-attention.

    Args:
        embed_dims: Channels.
        num_heads: Attention heads.
        qkv_bias: Biases for queries, keys and values.
    """

    def __init__(self, embed_dims: int, num_heads: int, qkv_bias: bool = True) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(embed_dims, 3 * embed_dims, bias=qkv_bias)
        self.proj = nn.Linear(embed_dims, embed_dims)

    def project_value(self, x: Tensor) -> Tensor:
        """The values alone, the last third of ``qkv``: ``(M, C) -> (M, C)``."""
        rows = slice(2 * self.proj.in_features, None)
        bias = None if self.qkv.bias is None else self.qkv.bias[rows]
        return F.linear(x, self.qkv.weight[rows], bias)


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
        projected = (self.project_value(x),) if follow else self.project(x)
        attended = attend(*projected).flatten(1)
        if self.training and self.drop_path.drop_prob:
            return self.mix(x, attended, *self.draw_kept(x, lengths))
        return tokenwise(self.mix, x, attended, training=self.training)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values: ``(M, C)`` to ``(M, heads, d)`` each."""
        qkv = tokenwise(lambda t: self.attn.qkv(self.norm1(t)), x, training=self.training)
        return qkv.unflatten(-1, (3, self.attn.num_heads, -1)).unbind(1)

    def project_value(self, x: Tensor) -> Tensor:
        """Values: ``(M, C) -> (M, heads, d)``."""
        project = self.attn.project_value
        value = tokenwise(lambda t: project(self.norm1(t)), x, training=self.training)
        return value.unflatten(-1, (self.attn.num_heads, -1))

    def mix(self, x: Tensor, attended: Tensor, *kept: Tensor) -> Tensor:
        """What follows attention, token by token; ``kept`` is from :meth:`draw_kept`, if at all."""
        change = self.ls1(self.attn.proj(attended))
        x = x + (change * kept[0] if kept else change)
        change = self.ls2(self.mlp(self.norm2(x)))
        return x + (change * kept[1] if kept else change)

    def draw_kept(self, x: Tensor, lengths: list[int]) -> list[Tensor]:
        """Stochastic depth: what attention and MLP are multiplied by, ``(M, 1)`` each."""
        images = x.new_ones(len(lengths), 1)
        repeats = torch.tensor(lengths, device=x.device)
        return [
            self.drop_path(images).repeat_interleave(repeats, 0, output_size=len(x))
            for _ in range(2)
        ]
