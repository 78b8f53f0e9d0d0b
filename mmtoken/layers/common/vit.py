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
from timm.models.vision_transformer import Block
from torch import Tensor

from .attention import attention, join_heads, split_heads
from .old_tiles import chunked_apply, use_tiling
from .plain import draws, is_plain

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
        """``(M, C) -> (M, C)``; ``attend`` and ``follow`` as for :class:`ViTBlock`."""
        return self.proj(self.attend(self.project(x, follow), attend))

    def attend(self, projected: Tensor, attend: Attend) -> Tensor:
        """Attention of what :meth:`project` returns: ``(M, C)``, for the last layer."""
        heads = projected.unflatten(-1, (-1, self.num_heads, self.embed_dims // self.num_heads))
        return attend(*heads.unbind(1)).flatten(1)

    @abstractmethod
    def project(self, x: Tensor, follow: bool) -> Tensor:
        """To queries, keys and values, ``(M, 3 * C)``, or with ``follow`` to values, ``(M, C)``."""


class Attention(HeadedAttention):
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


class ViTBlock(nn.Module):
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

    attention_type: type[nn.Module] = Attention

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
        attn, tile = self.attn, partial(chunked_apply, training=self.training, layers=(self,))
        if use_tiling(x, self.training, self):
            projected = tile(lambda t: attn.project(self.norm1(t), follow), x)
            attended = attn.attend(projected, attend)
            return tile(lambda t, a: self.add(t, attn.proj(a)), x, attended)
        update = attn(self.norm1(x), attend, follow)
        return self.add(x, update, *self.sample_drop_path(x, lengths))

    def add(self, x: Tensor, update: Tensor, *kept: Tensor) -> Tensor:
        """Add what attention gave, and then the MLP; ``kept`` is from :meth:`sample_drop_path`."""
        change = self.ls1(update)
        x = x + (change * kept[0] if kept else change)
        change = self.ls2(self.mlp(self.norm2(x)))
        return x + (change * kept[1] if kept else change)

    def sample_drop_path(self, x: Tensor, lengths: list[int]) -> list[Tensor]:
        """Stochastic depth: what attention and MLP are multiplied by, ``(M, 1)``; empty if none."""
        if not draws(self.drop_path):
            return []
        images = x.new_ones(len(lengths), 1)
        repeats = torch.tensor(lengths, device=x.device)
        return [
            self.drop_path(images).repeat_interleave(repeats, 0, output_size=len(x))
            for _ in range(2)
        ]


# A plain ViT block whose queries attend to other tokens.

NORM_EPS = 1e-6  # of every LayerNorm in ViT and DeiT


class CrossAttentionBlock(nn.Module):
    """Cross-attention and MLP, each behind a LayerNorm and with a residual.

    One LayerNorm serves queries and keys, as in the released code of STViT-R. Parameter names are
    those of timm's ViT block, but for ``attn.q`` and ``attn.kv``, which are ``attn.qkv`` there.

    Args:
        embed_dims: Channels.
        num_heads: Attention heads.
        feedforward_channels: Hidden channels of the MLP.
        qkv_bias: Biases for queries, keys and values.
        drop_path: Stochastic depth rate.
        layer_scale: Initial value of a LayerScale behind attention and MLP; None for none, as in
            ViT and DeiT.
    """

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
        self.attn = CrossAttention(embed_dims, num_heads)
        if not qkv_bias:
            self.attn.q.register_parameter('bias', None)
            self.attn.kv.register_parameter('bias', None)
        self.norm2 = nn.LayerNorm(embed_dims, NORM_EPS)
        self.mlp = Mlp(embed_dims, feedforward_channels)
        self.drop_path = DropPath(drop_path)
        scaled = layer_scale is not None
        self.ls1 = LayerScale(embed_dims, layer_scale) if scaled else nn.Identity()
        self.ls2 = LayerScale(embed_dims, layer_scale) if scaled else nn.Identity()

    def forward(self, query: Tensor, tokens: Tensor, residual: Tensor | None = None) -> Tensor:
        """Update the queries.

        Args:
            query: ``(B, Q, C)``, not normalised.
            tokens: What they attend to, ``(B, K, C)``, not normalised.
            residual: What the update is added to, ``(B, Q, C)``; by default the queries.

        Returns:
            ``(B, Q, C)``.
        """
        update = self.attn(self.norm1(query), self.norm1(tokens))
        x = query if residual is None else residual
        x = x + self.drop_path(self.ls1(update))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


# timm's ViT block, with its attention through the one door.


class PlainBlock(Block):
    """Attention and MLP, each behind a LayerNorm and with a residual.

    Arguments are those of timm's block.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.attn = SelfAttention(self.attn.qkv, self.attn.proj, self.attn.num_heads)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, L, C) -> (B, L, C)``."""
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class SelfAttention(nn.Module):
    """Multi-head self-attention with projections that are there already.

    Args:
        qkv: Makes queries, keys and values, ``C`` to ``3 * C`` channels.
        proj: The projection behind attention.
        num_heads: Attention heads.
    """

    def __init__(self, qkv: nn.Module, proj: nn.Module, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = qkv
        self.proj = proj

    def forward(self, x: Tensor) -> Tensor:
        """``(B, L, C) -> (B, L, C)``."""
        heads = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(join_heads(attention(*heads)))


class CrossAttention(nn.Module):
    """Multi-head attention whose queries and keys are different tokens."""

    def __init__(self, embed_dims: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(embed_dims, embed_dims)
        self.kv = nn.Linear(embed_dims, 2 * embed_dims)
        self.proj = nn.Linear(embed_dims, embed_dims)

    def forward(
        self,
        query: Tensor,
        tokens: Tensor,
        between: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> Tensor:
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
