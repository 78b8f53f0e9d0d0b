"""ViT blocks, tile by tile: all but attention treats every token alone."""

from torch import Tensor

from ..layers.common.vit import AttentionFn, ViTBlock, self_attention
from .tiling import chunked_apply, tiled, use_tiling


@tiled
class TiledViTBlock(ViTBlock):
    """:class:`~mmtoken.layers.common.vit.ViTBlock` for CPU inference."""

    def forward(
        self,
        x: Tensor,
        attn_fn: AttentionFn = self_attention,
        lengths: list[int] | None = None,
    ) -> Tensor:
        if not use_tiling(self, x):
            return super().forward(x, attn_fn, lengths)
        attn = self.attn
        projected = chunked_apply(lambda t: attn.project(self.norm1(t)), x)
        attended = attn.attend(projected, attn_fn)
        return chunked_apply(lambda t, a: self.add_mlp(t + self.ls1(attn.proj(a))), x, attended)
