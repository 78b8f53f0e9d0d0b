"""STViT on plain ViT, for classification and for dense prediction.

Source: STViT, arXiv 2303.08685. Its code for plain ViT was not released: what the paper leaves
open is decided here, see :class:`STViTDeiT`. Parameter names are timm's where timm has the layer.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from ..layers.common.packed import SparseFeatures, pack_equal
from ..layers.common.rotary import Rotation, rotated
from ..layers.common.utils import ceil_div
from ..layers.common.vit import ViTBlock, full_attention
from ..layers.stvit.semantic_vit import (
    Pooling,
    Residual,
    SemanticPoolBlock,
    SemanticRecovery,
    SemanticRefineBlock,
    turn_tiles,
)
from ..registry import MODELS
from .vit_base import TRUNK_OPTIONS, TRUNKS, DenseLayout, PlainBackbone

NUM_GENERATION_LAYERS = 2


class SemanticLayout(NamedTuple):
    """Semantic tokens, and the image tokens that they were made of.

    Attributes:
        grid: ``(H, W)`` of the image tokens.
        image: Image tokens behind the base layers, ``(B, H * W, C)``.
        initial: Prefix tokens behind the base layers, and what image tokens were pooled to at
            first, ``(B, P + N, C)``.
        rotation: Of prefix and semantic tokens, where positions are rotary.
        image_rotation: Likewise, of image tokens.
    """

    grid: tuple[int, int]
    image: Tensor
    initial: Tensor
    rotation: Rotation | None
    image_rotation: Rotation | None


@MODELS.register_module()
class STViTDeiT(PlainBackbone):
    """DeiT that works on a few semantic tokens after its first blocks.

    ``base_layers`` ordinary blocks are followed by two layers that make semantic tokens, in place
    of two blocks, and by the remaining blocks, which see the semantic tokens alone. The image
    tokens are not updated any more. A dense map behind such a block is recovered by image tokens
    that query the semantic tokens, in one layer per output. All three are in
    :mod:`mmtoken.layers.stvit.semantic_vit`.

    The paper's 16 semantic tokens are for images of 224 pixels, where 4 x 4 of them stand for
    14 x 14 image tokens. Here a semantic token always stands for ``semantic_size ** 2`` image
    tokens, so larger images have more, and the learned centers are resampled like position
    embeddings.

    The paper has no class token: it averages the semantic tokens. Nor has this by default; but
    trained trunks have one, and registers. These prefix tokens pass the base layers as in ViT, are
    not pooled, and stay beside the semantic tokens in all blocks behind. The recovery does not see
    them. With ``out_type='avg_featmap'`` the mean is over the semantic tokens alone.

    Padding: the padding of a batch is treated like the image. Attention sees all of it, positions
    and centers are resampled to the padded grid and ``out_type='avg_featmap'`` averages over it, so
    the maps of an image differ, everywhere, from those it has alone.

    Args:
        arch: ``'tiny'``, ``'small'``, ``'base'``, ``'large'``, or a dict with the keys
            ``embed_dims``, ``num_layers``, ``num_heads`` and ``feedforward_channels``.
        semantic_size: Side of the tile that becomes one semantic token, in image tokens. ``None``
            gives the dense twin: DeiT.
        base_layers: Blocks before the semantic tokens are made.
        pooling: How a tile is pooled at first, see
            :class:`~mmtoken.layers.stvit.semantic_vit.SpatialPooling`.
        global_centers: Add learned centers to the semantic tokens that query in the second layer.
        refine_residual: What the second layer's attention is added to: its ``'query'``, or the
            ``'initial'`` tokens, pooled before the first layer.
        recovery_scale: Initial LayerScale of the recovery; None for none.
        kwargs: As for :class:`~mmtoken.backbones.vit_base.PlainBackbone`. ``out_type='tokens'``
            returns :class:`~mmtoken.layers.common.packed.SparseFeatures` for
            :class:`mmtoken.SemanticRecoveryNeck`: each image's tokens, row by row, and behind them
            its semantic tokens where there are any. Recovered maps are normalized by their
            recovery; outputs of the base layers are not normalized.

    Raises:
        ValueError: Bad argument values; the message says what is allowed.
        TypeError: ``arch`` is neither a name nor a dict.

    Example:
        >>> arch = dict(embed_dims=32, num_layers=3, num_heads=2, feedforward_channels=64)
        >>> backbone = STViTDeiT(arch, semantic_size=2, base_layers=1)
        >>> backbone(torch.zeros(1, 3, 64, 96))[0].shape
        torch.Size([1, 32, 4, 6])
    """

    out_types = ('map', 'tokens', 'cls_token', 'avg_featmap')
    arch_options = TRUNK_OPTIONS
    arch_zoo = PlainBackbone.arch_zoo | TRUNKS
    twin_args = dict(semantic_size=None)
    ignorable_keys = rf'{PlainBackbone.ignorable_keys}|recover\..*'
    newly_initialized_keys = r'blocks\.\d+\.(pool\..*|centers)|recover\..*'

    def __init__(
        self,
        arch: str | Mapping = 'small',
        semantic_size: int | None = 4,
        base_layers: int = 4,
        pooling: Pooling = 'attention',
        global_centers: bool = True,
        refine_residual: Residual = 'query',
        recovery_scale: float | None = None,
        **kwargs,
    ) -> None:
        super().__init__(arch, **kwargs)
        depth = self.num_stages
        if semantic_size is not None and not 0 <= base_layers <= depth - NUM_GENERATION_LAYERS:
            raise ValueError(
                f'base_layers must be from 0 to {depth - NUM_GENERATION_LAYERS}, which leaves two '
                f'of {depth} layers to make semantic tokens, got {base_layers}'
            )
        # The layer that pools; behind the last block, so nowhere, in the dense twin
        self.pool_index = depth if semantic_size is None else base_layers
        crossing = {name: value for name, value in self.block_args.items() if name != 'attn'}
        crossing.update(qk_norm=self.qk_norm)
        self.blocks = nn.ModuleList()
        for i, rate in enumerate(self.drop_rates):
            if i == self.pool_index:
                block = SemanticPoolBlock(
                    semantic_size=semantic_size, pooling=pooling, drop_path=rate, **crossing
                )
            elif i == self.pool_index + 1:
                centers = tuple(ceil_div(side, semantic_size) for side in self.pos_grid)
                block = SemanticRefineBlock(
                    semantic_size=semantic_size,
                    center_grid=centers if global_centers else None,
                    residual=refine_residual,
                    drop_path=rate,
                    **crossing,
                )
            else:
                block = ViTBlock(drop_path=rate, **self.block_args)
            self.blocks.append(block)
        if self.out_type == 'map':
            recovery = dict(crossing, layer_scale=recovery_scale)
            semantic = (i for i in self.out_indices if i >= self.pool_index)
            self.recover = nn.ModuleDict({str(i): SemanticRecovery(**recovery) for i in semantic})
        self.finish_init()

    @property
    def has_norm(self) -> bool:
        """Recovered maps have a norm of their own."""
        dense = self.pool_index == self.num_stages
        return self.out_type in ('cls_token', 'avg_featmap') or (dense and super().has_norm)

    def output_layers(self, index: int) -> list[nn.Module]:
        layers = super().output_layers(index)
        if self.out_type == 'map' and index >= self.pool_index:
            layers.append(self.recover[str(index)])
        return layers

    def run_block(
        self, index: int, tokens: Tensor, layout: DenseLayout | SemanticLayout
    ) -> tuple[Tensor, DenseLayout | SemanticLayout]:
        block = self.blocks[index]
        if index == self.pool_index:
            rotation = turn_tiles(layout.rotation, layout.grid, block.pool.size)
            attn_fn = rotated(full_attention, rotation, layout.rotation)
            semantic, initial = self.checkpoint(block, tokens, layout.grid, attn_fn)
            image, image_rotation = tokens[:, self.num_prefix_tokens :], None
            if rotation is not None:
                image_rotation = layout.rotation.of(slice(self.num_prefix_tokens, None))
            return semantic, SemanticLayout(layout.grid, image, initial, rotation, image_rotation)
        if index == self.pool_index + 1:
            attn_fn = full_attention
            if layout.rotation is not None:
                keys = layout.rotation.then(layout.image_rotation)
                attn_fn = rotated(attn_fn, layout.rotation, keys)
            args = (layout.initial, layout.image, layout.grid, attn_fn)
            return self.checkpoint(block, tokens, *args), layout
        return super().run_block(index, tokens, layout)

    def restore(self, index: int, tokens: Tensor, layout: DenseLayout | SemanticLayout) -> Tensor:
        if self.out_type != 'map' or index < self.pool_index:
            return tokens
        recover = self.recover[str(index)]
        prefix, semantic = tokens.tensor_split([self.num_prefix_tokens], dim=1)
        attn_fn = full_attention
        if layout.rotation is not None:
            keys = layout.rotation.of(slice(self.num_prefix_tokens, None))
            attn_fn = rotated(attn_fn, layout.image_rotation, keys)
        recover.record(layout.image, semantic, layout.grid, attn_fn)
        image = self.checkpoint(recover, layout.image, semantic, attn_fn)
        return torch.cat([prefix, image], dim=1) if self.num_prefix_tokens else image

    def to_features(
        self, index: int, tokens: Tensor, layout: DenseLayout | SemanticLayout
    ) -> SparseFeatures:
        """Each image's tokens, row by row, and behind them its semantic tokens, if any."""
        tokens = tokens[:, self.num_prefix_tokens :]
        if index >= self.pool_index:
            tokens = torch.cat([layout.image, tokens], dim=1)
        return pack_equal(tokens, layout.grid)
