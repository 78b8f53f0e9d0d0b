"""ViT blocks: self-attention or cross-attention, then an MLP.

Source: ViT, arXiv 2010.11929. Parameter names are timm's; cross-attention has ``attn.q`` and
``attn.kv`` where timm has ``attn.qkv``.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn as nn
from timm.layers import DropPath, GluMlp, LayerScale, Mlp
from torch import Tensor

from .attention import attention
from .plain import draws

NORM_EPS = 1e-6  # of every LayerNorm in ViT and DeiT

# Queries, keys and values to their attention, all (..., heads, d)
AttentionFn = Callable[[Tensor, Tensor, Tensor], Tensor]


def full_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """Attention of all queries of an image to all its keys: ``(B, L, heads, d)`` each.

    ``bias`` is as for :func:`~mmtoken.layers.common.attention.attention`.
    """
    heads = (t.transpose(1, 2) for t in (query, key, value))
    return attention(*heads, bias).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention; which tokens attend to which is the caller's choice.

    Args:
        embed_dims: Channels, C.
        num_heads: Attention heads.
        qkv_bias: Biases of queries, keys and values.
        linear: Makes the projections, as ``nn.Linear(in_dims, out_dims, bias=True)`` does.
        qk_norm: Normalizes queries and keys of a head, as ``nn.LayerNorm(dims)`` does; None for
            none.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        qkv_bias: bool = True,
        linear: Callable[..., nn.Module] = nn.Linear,
        qk_norm: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = linear(embed_dims, 3 * embed_dims, bias=qkv_bias)
        self.q_norm = self.k_norm = None
        if qk_norm is not None:
            self.q_norm, self.k_norm = (qk_norm(embed_dims // num_heads) for _ in range(2))
        self.proj = linear(embed_dims, embed_dims)

    def forward(self, x: Tensor, attn_fn: AttentionFn = full_attention) -> Tensor:
        """``(..., C) -> (..., C)``."""
        return self.proj(self.attend(self.qkv(x), attn_fn))

    def attend(self, qkv: Tensor, attn_fn: AttentionFn) -> Tensor:
        """Attention of projected tokens: ``(..., 3 * C) -> (..., C)``."""
        query, key, value = qkv.unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        if self.q_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        return attn_fn(query, key, value).flatten(-2)


class CrossAttention(nn.Module):
    """Multi-head attention of queries to other tokens.

    Args:
        embed_dims: Channels, C.
        num_heads: Attention heads.
        qkv_bias: Biases of queries, keys and values.
        qk_norm: As for :class:`Attention`.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        qkv_bias: bool = True,
        qk_norm: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(embed_dims, embed_dims, bias=qkv_bias)
        self.kv = nn.Linear(embed_dims, 2 * embed_dims, bias=qkv_bias)
        self.q_norm = self.k_norm = None
        if qk_norm is not None:
            self.q_norm, self.k_norm = (qk_norm(embed_dims // num_heads) for _ in range(2))
        self.proj = nn.Linear(embed_dims, embed_dims)

    def forward(
        self, query: Tensor, tokens: Tensor, attn_fn: AttentionFn = full_attention
    ) -> Tensor:
        """Every query attends to all tokens: ``(B, Q, C), (B, K, C) -> (B, Q, C)``."""
        return self.proj(self.attend(self.q(query), self.kv(tokens), attn_fn))

    def attend(self, query: Tensor, key_value: Tensor, attn_fn: AttentionFn) -> Tensor:
        """Attention of projected tokens: ``(B, Q, C), (B, K, 2 * C) -> (B, Q, C)``."""
        query = query.unflatten(-1, (self.num_heads, -1))
        key, value = key_value.unflatten(-1, (2, self.num_heads, -1)).unbind(-3)
        if self.q_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        return attn_fn(query, key, value).flatten(-2)


class ViTBlock(nn.Module):
    """Attention and MLP, each behind a LayerNorm and with a residual.

    Everything but attention treats each token alone, so tokens may also be packed: images with
    different numbers of tokens one after the other, without padding.

    Args:
        embed_dims: Channels, C.
        num_heads: Attention heads.
        feedforward_channels: Hidden channels of the MLP.
        qkv_bias: Biases of queries, keys and values.
        drop_path: Stochastic depth rate.
        layer_scale: Initial value of a LayerScale behind attention and MLP; None for none.
        attn: Makes the attention, as ``Attention(embed_dims, num_heads, qkv_bias)`` does.
        mlp: Makes the MLP, as ``Mlp(embed_dims, feedforward_channels)`` does.
        norm_eps: Epsilon of the two LayerNorms.

    Example:
        >>> block = ViTBlock(embed_dims=32, num_heads=2, feedforward_channels=64)
        >>> block(torch.zeros(2, 10, 32)).shape
        torch.Size([2, 10, 32])
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        feedforward_channels: int,
        qkv_bias: bool = True,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        attn: Callable[..., nn.Module] = Attention,
        mlp: Callable[..., nn.Module] = Mlp,
        norm_eps: float = NORM_EPS,
    ) -> None:
        super().__init__()
        scaled = layer_scale is not None
        self.norm1 = nn.LayerNorm(embed_dims, norm_eps)
        self.attn = attn(embed_dims, num_heads, qkv_bias)
        self.ls1 = LayerScale(embed_dims, layer_scale) if scaled else nn.Identity()
        self.norm2 = nn.LayerNorm(embed_dims, norm_eps)
        self.mlp = mlp(embed_dims, feedforward_channels)
        self.ls2 = LayerScale(embed_dims, layer_scale) if scaled else nn.Identity()
        self.drop_path = DropPath(drop_path)

    def forward(
        self,
        x: Tensor,
        attn_fn: AttentionFn = full_attention,
        lengths: list[int] | None = None,
    ) -> Tensor:
        """Update tokens.

        Args:
            x: Tokens, ``(B, L, C)``, or packed, ``(M, C)``.
            attn_fn: Attention of queries to keys and values, all ``(..., heads, d)``.
            lengths: Of packed tokens, how many each image has.

        Returns:
            In the shape of ``x``.
        """
        x = x + self.drop(self.ls1(self.attn(self.norm1(x), attn_fn)), lengths)
        return self.add_mlp(x, lengths)

    def add_mlp(self, x: Tensor, lengths: list[int] | None = None) -> Tensor:
        """The second half of the block."""
        return x + self.drop(self.ls2(self.mlp(self.norm2(x))), lengths)

    def drop(self, update: Tensor, lengths: list[int] | None) -> Tensor:
        """Stochastic depth: drop the update of whole images."""
        if lengths is None or not draws(self.drop_path):
            return self.drop_path(update)
        keep = self.drop_path(update.new_ones(len(lengths), 1))
        repeats = torch.tensor(lengths, device=update.device)
        return update * keep.repeat_interleave(repeats, 0, output_size=len(update))


class SwiGLU(GluMlp):
    """An MLP whose hidden channels are gated, in one projection of twice as many.

    Source: arXiv 2002.05202; a form of timm's ``GluMlp``, with its names.

    Args:
        embed_dims: Channels, C.
        feedforward_channels: Hidden channels behind the gate.
        norm_layer: Normalizes these, as ``nn.LayerNorm(dims)`` does; None for none.
    """

    def __init__(
        self,
        embed_dims: int,
        feedforward_channels: int,
        norm_layer: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__(
            embed_dims,
            2 * feedforward_channels,
            act_layer=nn.SiLU,
            norm_layer=norm_layer,
            gate_last=False,
        )


MLPS = ('gelu', 'swiglu', 'swiglu-norm')


def mlp_layer(kind: str, norm_layer: Callable[[int], nn.Module]) -> Callable[..., nn.Module]:
    """What makes the MLPs of one of :data:`MLPS`, for ``mlp`` of :class:`ViTBlock`.

    Args:
        kind: ``'swiglu-norm'`` is ``'swiglu'`` with normalized hidden channels.
        norm_layer: As ``nn.LayerNorm(dims)``.
    """
    normalized = partial(SwiGLU, norm_layer=norm_layer)
    return dict(zip(MLPS, (Mlp, SwiGLU, normalized), strict=True))[kind]


class CrossAttentionBlock(ViTBlock):
    """A ViT block whose queries attend to other tokens.

    One LayerNorm serves queries and keys, as in the released code of STViT-R. Arguments are those
    of :class:`ViTBlock`, and ``qk_norm`` is that of :class:`CrossAttention`.
    """

    def __init__(self, *args, qk_norm: Callable[[int], nn.Module] | None = None, **kwargs) -> None:
        super().__init__(*args, attn=partial(CrossAttention, qk_norm=qk_norm), **kwargs)

    def forward(
        self,
        query: Tensor,
        tokens: Tensor,
        residual: Tensor | None = None,
        attn_fn: AttentionFn = full_attention,
    ) -> Tensor:
        """Update queries.

        Args:
            query: ``(B, Q, C)``, not normalized.
            tokens: What they attend to, ``(B, K, C)``, not normalized.
            residual: What the update is added to, ``(B, Q, C)``; the queries by default.
            attn_fn: Attention of queries to keys and values, ``(B, L, heads, d)`` each.

        Returns:
            ``(B, Q, C)``.
        """
        update = self.ls1(self.attn(self.norm1(query), self.norm1(tokens), attn_fn))
        return self.add_mlp((query if residual is None else residual) + self.drop_path(update))
