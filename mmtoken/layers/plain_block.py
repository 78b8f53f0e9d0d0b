"""timm's ViT block, with its attention through the one door.

Source: ViT, arXiv 2010.11929. Parameter names are timm's.
"""

import torch.nn as nn
from timm.models.vision_transformer import Block
from torch import Tensor

from ..tokens.attention import attention, join_heads


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
