"""STViT on plain ViT, for classification and for dense prediction.

Source: STViT, arXiv 2303.08685. Its code for plain ViT was not released: what the paper leaves
open is decided here, see :class:`STViTDeiT`. Parameter names are timm's where timm has the layer.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal, get_args

import torch
import torch.nn as nn
from torch import Tensor

from ..layers.common.packed import SparseFeatures, pack_equal
from ..layers.common.utils import join_maps, run_block, to_map
from ..layers.common.vit import NORM_EPS, PlainBlock
from ..layers.stvit.semantic_vit import (
    Pooling,
    Residual,
    SemanticPoolBlock,
    SemanticRecovery,
    SemanticRefineBlock,
)
from ..registry import MODELS
from .base import PlainBackbone, check_out_type

OutType = Literal['map', 'tokens', 'avg_featmap']
NUM_GENERATION_LAYERS = 2


@MODELS.register_module()
class STViTDeiT(PlainBackbone):
    """DeiT that works on a few semantic tokens after its first blocks.

    ``base_layers`` ordinary blocks, two layers that make semantic tokens
    (:mod:`mmtoken.layers.stvit.semantic_vit`), which take the place of two blocks, and the remaining blocks
    on the semantic tokens alone. The image tokens stand still from the base layers on; a dense map
    behind them is made by image tokens that query the semantic tokens of that depth
    (:mod:`mmtoken.layers.stvit.semantic_vit`), in one layer per tap. The paper's number of tokens is for
    images of 224 pixels, where 4 x 4 semantic tokens serve 14 x 14 image tokens; here a semantic
    token always stands for ``semantic_size ** 2`` image tokens, so larger images have more, and
    the learned centers are resampled to their grid as position embeddings are.

    There is no class token: the paper pools over the tokens.

    Padding: the padding of a batch is image like any other. Attention sees all of it, positions and
    centers are resampled to the padded grid, tiles are laid over it anew, and
    ``out_type='avg_featmap'`` averages over it: an image has other maps, everywhere, than alone.

    Args:
        arch: ``'tiny'``, ``'small'``, ``'base'``, or a dict with the keys ``embed_dims``,
            ``num_layers``, ``num_heads`` and ``feedforward_channels``.
        semantic_size: Side of the tile that becomes one semantic token, in image tokens. ``None``
            gives the dense twin: DeiT.
        base_layers: Blocks before the semantic tokens are made.
        pooling: How a tile is pooled at first, see
            :class:`~mmtoken.layers.stvit.semantic_vit.SpatialPooling`.
        global_centers: Add learned centers to the semantic tokens that query in the second layer.
        refine_residual: What the second layer's attention is added to: its ``'query'``, or the
            ``'initial'`` tokens, pooled before the first layer.
        recovery_scale: Initial LayerScale of the recovery; None for none.
        img_size: Image that the position embedding and the centers are laid out for, in pixels: a
            side, or ``(H, W)``. Images of any size are accepted.
        patch_size: Side of a patch, in pixels.
        in_channels: Channels of the image.
        qkv_bias: Biases for queries, keys and values.
        drop_path_rate: Stochastic depth of the last block, rising linearly from 0.
        out_indices: Blocks that are tapped, in rising order; negative ones count from the end.
        out_type: ``'map'`` returns dense maps. The last block of the dense twin is normalised, as
            in mmpretrain; recovered maps are normalised by their recovery, and taps in the base
            layers are not. ``'tokens'`` returns :class:`~mmtoken.layers.common.packed.SparseFeatures` for
            :class:`mmtoken.SemanticRecoveryNeck`: each image's tokens, row by row, and after them
            its semantic tokens where the tap has any. ``'avg_featmap'`` returns the mean over the
            last block's normalised tokens, for classification.
        frozen_stages: Blocks kept fixed: 0 freezes the patch and position embedding, 1 the first
            block too, and so on, each with the recovery of its tap; -1 freezes nothing.
        norm_eval: Of no effect here, since there is no batch norm.
        with_cp: Recompute the activations of each block in backward.
        init_cfg: MMEngine's initialisation config.

    Raises:
        ValueError: Bad argument values; the message says what is allowed.
        TypeError: ``arch`` is neither a name nor a dict.
    """

    twin_args = dict(semantic_size=None)

    ignorable_keys = r'(head|head_dist|norm|fc_norm|recover)\..*|cls_token|dist_token'
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
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_channels: int = 3,
        qkv_bias: bool = True,
        drop_path_rate: float = 0.0,
        out_indices: Sequence[int] = (-1,),
        out_type: OutType = 'map',
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        arch = self.resolve_arch(arch)
        dims, depth, heads = arch['embed_dims'], arch['num_layers'], arch['num_heads']
        if semantic_size is not None and not 0 <= base_layers <= depth - NUM_GENERATION_LAYERS:
            raise ValueError(
                f'base_layers must be from 0 to {depth - NUM_GENERATION_LAYERS}, which leaves two '
                f'of {depth} layers to make semantic tokens, got {base_layers}'
            )
        super().__init__(
            dims, depth, img_size, patch_size, in_channels,
            out_indices, frozen_stages, norm_eval, init_cfg,
        )  # fmt: skip
        last = depth - 1
        check_out_type(out_type, get_args(OutType), self.out_indices, last)
        self.out_type = out_type
        self.with_cp = with_cp
        self.out_channels = (dims,) * len(self.out_indices)

        cross = dict(
            num_heads=heads, feedforward_channels=arch['feedforward_channels'], qkv_bias=qkv_bias
        )
        # The layer that pools; behind the last block, so nowhere, in the dense twin.
        self.pool_index = depth if semantic_size is None else base_layers
        self.blocks = nn.ModuleList()
        for i in range(self.num_built):
            rate = drop_path_rate * i / max(last, 1)
            if i == self.pool_index:
                block = SemanticPoolBlock(dims, semantic_size, pooling, drop_path=rate, **cross)
            elif i == self.pool_index + 1:
                centers = [-(-side // semantic_size) for side in self.pos_grid]
                block = SemanticRefineBlock(
                    dims, semantic_size, tuple(centers) if global_centers else None,
                    refine_residual, drop_path=rate, **cross,
                )  # fmt: skip
            else:
                # timm truncates the product of width and ratio
                ratio = (arch['feedforward_channels'] + 0.5) / dims
                block = PlainBlock(
                    dims, heads, ratio, qkv_bias, drop_path=rate,
                    norm_layer=partial(nn.LayerNorm, eps=NORM_EPS),
                )  # fmt: skip
            self.blocks.append(block)
        if out_type == 'map':
            self.recover = nn.ModuleDict({
                str(i): SemanticRecovery(dims, layer_scale=recovery_scale, **cross)
                for i in self.out_indices
                if i >= self.pool_index
            })  # fmt: skip
        # Only where something uses it, since DDP refuses parameters without a gradient.
        dense_end = semantic_size is None and last in self.out_indices
        normed = dense_end or out_type == 'avg_featmap'
        self.norm = nn.LayerNorm(dims, NORM_EPS) if normed else nn.Identity()
        self.train()

    def output_layers(self, index: int) -> list[nn.Module]:
        layers = []
        if self.out_type == 'map' and index >= self.pool_index:
            layers.append(self.recover[str(index)])
        if index == self.num_stages - 1:
            layers.append(self.norm)
        return layers

    def forward(self, x: Tensor) -> tuple[Tensor, ...] | tuple[SparseFeatures, ...]:
        """Compute the taps.

        Args:
            x: Images, ``(B, in_channels, H, W)``, any H and W.

        Returns:
            One for each of ``out_indices``, according to ``out_type``: a map
            ``(B, C, ceil(H / patch_size), ceil(W / patch_size))``, tokens, or a mean ``(B, C)``.
        """
        tokens, grid = self.embed(x)
        image, taps = None, []
        for i, block in enumerate(self.blocks):
            if i == self.pool_index:
                image = tokens
                tokens, initial = self._run(block, image, grid)
            elif i == self.pool_index + 1:
                tokens = self._run(block, tokens, initial, image, grid)
            else:
                tokens = self._run(block, tokens)
            if i in self.out_indices:
                taps.append(self._tap(i, tokens, image, grid))
        return join_maps(taps)

    def _tap(
        self, index: int, tokens: Tensor, image: Tensor | None, grid: tuple[int, int]
    ) -> Tensor | SparseFeatures:
        """The output behind one block; without ``image`` its tokens are the image tokens."""
        if index == self.num_stages - 1:
            tokens = self.norm(tokens)
        if self.out_type == 'avg_featmap':
            return tokens.mean(dim=1)
        if self.out_type == 'tokens':
            return pack_equal(tokens if image is None else torch.cat([image, tokens], dim=1), grid)
        if image is not None:
            tokens = self._run(self.recover[str(index)], image, tokens)
        return to_map(tokens.unflatten(1, grid))

    def _run(self, block: nn.Module, *args):
        return run_block(block, *args, recompute=self.with_cp)
