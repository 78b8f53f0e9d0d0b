"""A plain ViT block whose queries attend to other tokens."""

import torch.nn as nn
from timm.layers import DropPath, LayerScale, Mlp
from torch import Tensor

from .semantic import CrossAttention

NORM_EPS = 1e-6  # of every LayerNorm in ViT and DeiT


class CrossBlock(nn.Module):
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
