"""Blocks that share an attention map.

Source: PSViT, arXiv 2108.03428. Parameter names are timm's, but for ``attn.v``, which is the last
third of ``attn.qkv`` there.
"""

import torch
import torch.nn as nn
from torch import Tensor

from ..common.attention import attention
from ..common.vit import Attention, ViTBlock
from .shared_attention import Sharing, shared_attention
from .windows import Pieces


class ValueOnlyAttention(Attention):
    """Attention whose map is another layer's: it projects values and outputs alone.

    Loading a dense layer's ``qkv`` takes the values of it.

    Args:
        embed_dims: Channels.
        num_heads: Attention heads.
        qkv_bias: Bias of values.
    """

    def __init__(self, embed_dims: int, num_heads: int, qkv_bias: bool = True) -> None:
        super().__init__(embed_dims, num_heads, qkv_bias)
        del self.qkv
        self.v = nn.Linear(embed_dims, embed_dims, bias=qkv_bias)

    def project(self, x: Tensor) -> Tensor:
        """Values: ``(..., C) -> (..., C)``."""
        return self.v(x)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        for kind in ('weight', 'bias'):
            joint = state_dict.pop(f'{prefix}qkv.{kind}', None)
            if joint is not None:
                state_dict[f'{prefix}v.{kind}'] = joint[2 * len(joint) // 3 :]
        super()._load_from_state_dict(state_dict, prefix, *args)


class SharedMapBlock(ViTBlock):
    """A ViT block that uses the attention map of another block.

    Arguments as for :class:`~mmtoken.layers.common.vit.ViTBlock`.
    """

    attn_class = ValueOnlyAttention


class GroupAttention:
    """The attention of a group of blocks: the first one's map, in every window.

    Args:
        batch: Images.
        pieces: From :func:`~mmtoken.layers.psvit.windows.cut_windows`.
        sharing: As for :func:`~mmtoken.layers.psvit.shared_attention.shared_attention`; None for a group
            of one, which has nobody to share with.
        overwrite: Likewise.
    """

    def __init__(
        self, batch: int, pieces: Pieces, sharing: Sharing | None, overwrite: bool = False
    ) -> None:
        self.batch = batch
        self.pieces = pieces
        self.sharing = sharing
        self.overwrite = overwrite
        self.shared = []

    def lead(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend, and keep the map: ``(B * N, heads, d)`` each to ``(B * N, heads, d)``."""
        outs = []
        for q, k, v in zip(*map(self.cut, (query, key, value)), strict=True):
            if self.sharing is None:
                outs.append(attention(q, k, v))
            else:
                out, shared = shared_attention(q, k, v, self.sharing, self.overwrite)
                outs.append(out)
                self.shared.append(shared)
        return self.join(outs)

    def follow(self, value: Tensor) -> Tensor:
        """Attend with the map that is kept: ``(B * N, heads, d) -> (B * N, heads, d)``."""
        pairs = zip(self.shared, self.cut(value), strict=True)
        return self.join([shared.attend(v) for shared, v in pairs])

    def cut(self, x: Tensor) -> list[Tensor]:
        """``(B * N, heads, d)`` to ``(B * windows, heads, L, d)`` of each piece. Inverse: join."""
        parts = x.unflatten(0, (self.batch, -1)).split([n * length for n, length in self.pieces], 1)
        return [
            part.unflatten(1, windows).flatten(0, 1).transpose(1, 2)
            for part, windows in zip(parts, self.pieces, strict=True)
        ]

    def join(self, parts: list[Tensor]) -> Tensor:
        parts = [
            part.transpose(1, 2).unflatten(0, (self.batch, -1)).flatten(1, 2) for part in parts
        ]
        return torch.cat(parts, dim=1).flatten(0, 1) if len(parts) > 1 else parts[0].flatten(0, 1)
