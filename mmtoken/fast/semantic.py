"""Semantic blocks of STViT-R, tile by tile: all but attention treats each token alone."""

from torch import Tensor

from ..layers.stvit.neighborhood import Attend
from ..layers.stvit.semantic_swin import SemanticBlock
from .tiling import chunked_apply, tiled, use_tiling


@tiled
class TiledSemanticBlock(SemanticBlock):
    """:class:`~mmtoken.layers.stvit.semantic_swin.SemanticBlock` for CPU inference."""

    def forward(self, query: Tensor, tokens: Tensor, attend: Attend) -> Tensor:
        if not use_tiling(self, query):
            return super().forward(query, tokens, attend)
        attn = self.attn
        queries = chunked_apply(lambda t: attn.q(self.norm1(t)), query)
        keys = chunked_apply(lambda t: attn.kv(self.norm1(t)), tokens)
        attended = attend(queries, keys, attn.num_heads)
        return chunked_apply(lambda t, a: self.add(t, attn.proj(a)), query, attended)
