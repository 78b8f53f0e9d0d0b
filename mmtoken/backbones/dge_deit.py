"""DGE on plain ViT.

Source: DGE, arXiv 2301.03831; released code github.com/StevenGrove/vtpack (Apache-2.0). Parameter
names are timm's, but for ``attn.q`` and ``attn.kv``, which are ``attn.qkv`` there.
"""

from collections.abc import Mapping, Sequence
from typing import get_args

import torch.nn as nn
from torch import Tensor

from ..arguments import as_tuple
from ..layers.common.padding import padding_regions, valid_size
from ..layers.common.utils import drop_path_rates, join_maps, to_map
from ..layers.common.vit import NORM_EPS
from ..layers.dge.block import (
    DynamicGranularityBlock,
    SpatialReductionAttention,
    TrainMode,
    run_blocks,
)
from ..losses.budget import BUDGET, BlockWidths, PatchWidths, build_budget, publish_budget
from ..registry import MODELS
from .base import PlainBackbone, check_out_type
from .dge_pvt import OutType


@MODELS.register_module()
class DGEDeiT(PlainBackbone):
    """DeiT whose blocks select a token granularity for each region.

    Padding: regions that lie wholly in the padding of a batch get the coarsest granularity and are
    not counted, whatever their color, where image sizes are known (:class:`mmtoken.TokenLossHook`,
    :func:`mmtoken.follow_image_sizes`, :func:`mmtoken.set_image_sizes`); regions that an image
    reaches into count fully. Elsewhere trailing zeros are taken for padding, and so is the black
    lower part of an image. As in the release, tokens of padding are keys like any others, and
    positions are resampled to the padded grid. So maps, and occasionally a choice, differ from
    those of the image alone.

    Args:
        arch: ``'tiny'``, ``'small'``, ``'base'``, or a dict with the keys ``embed_dims``,
            ``num_layers``, ``num_heads`` and ``feedforward_channels``.
        granularities: Sides of the cells that become one query, finest first, in tokens, starting
            with 1. ``(1,)`` gives the dense twin: DeiT.
        region_size: Side of a region, in tokens.
        train_mode: How routers get their gradients, ``'exact'``, ``'dense'`` or ``'sparse'``, see
            :class:`~mmtoken.layers.dge.block.DynamicGranularityBlock`.
        budget: Config of the loss that limits the number of queries; with it, training needs
            :class:`mmtoken.TokenLossHook`. None leaves routers to the loss of the task.
        cls_token: Whether there is a class token, as in the release. Dense prediction needs none.
        img_size: Image size of the position embedding, in pixels: a side, or ``(H, W)``. Images of
            any size are accepted. Released DGE weights are for 256.
        patch_size: Side of a patch, in pixels.
        in_channels: Channels of the image.
        qkv_bias: Biases of queries, keys and values.
        drop_path_rate: Stochastic depth of the last block, rising linearly from 0.
        out_indices: Blocks whose maps are returned, in rising order; negative ones count from the
            end. The output of the last block is normalized, as in mmpretrain.
        out_type: ``'map'``; for classification ``'cls_token'``, the normalized class token of the
            last block, or ``'avg_featmap'``, the mean of its normalized tokens.
        frozen_stages: Blocks kept fixed: 0 freezes the patch and position embedding, 1 the first
            block too, and so on; -1 freezes nothing.
        norm_eval: Accepted for compatibility; unused, since there is no batch norm.
        with_cp: Recompute the activations of each block in backward.
        init_cfg: MMEngine's initialization config.

    Raises:
        ValueError: Invalid argument values; the message says what is allowed.
        TypeError: ``arch`` is neither a name nor a dict.

    Example:
        >>> arch = dict(embed_dims=32, num_layers=2, num_heads=2, feedforward_channels=64)
        >>> model = DGEDeiT(arch, out_indices=(0, 1)).eval()
        >>> [tuple(m.shape) for m in model(torch.zeros(1, 3, 64, 96))]
        [(1, 32, 4, 6), (1, 32, 4, 6)]
    """

    ratio_name = DynamicGranularityBlock.ratio_name
    twin_args = dict(granularities=(1,), budget=None)
    ignorable_keys = r'(head|head_dist|norm|fc_norm|budget)\..*|cls_token|dist_token'
    newly_initialized_keys = r'budget\..*'

    def __init__(
        self,
        arch: str | Mapping = 'small',
        granularities: Sequence[int] = (1, 2, 4),
        region_size: int = 4,
        train_mode: TrainMode = 'exact',
        budget: dict | None = BUDGET,
        cls_token: bool = False,
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
        super().__init__(
            dims, depth, img_size, patch_size, in_channels,
            out_indices, frozen_stages, norm_eval, init_cfg, cls_token,
        )  # fmt: skip
        check_out_type(out_type, get_args(OutType), self.out_indices, depth - 1, cls_token)
        self.out_type = out_type
        self.out_channels = (dims,) * len(self.out_indices)
        self.granularities = as_tuple(granularities)
        self.budget = build_budget(budget, self.granularities)
        self.with_cp = with_cp
        (rates,) = drop_path_rates(drop_path_rate, [depth])
        self.blocks = nn.ModuleList(
            DynamicGranularityBlock(
                dims, SpatialReductionAttention(dims, heads, 1, qkv_bias),
                arch['feedforward_channels'], self.granularities, region_size, train_mode, rate,
                NORM_EPS,
            )
            for rate in rates[: self.num_built]
        )  # fmt: skip
        self.block_widths = BlockWidths.of(self.blocks[0], attn_products=2)
        self.patch_widths = PatchWidths(in_channels, dims, patch_size, has_norm=False)
        # Only where something uses it, since DDP refuses parameters without a gradient.
        normed = depth - 1 in self.out_indices
        self.norm = nn.LayerNorm(dims, NORM_EPS) if normed else nn.Identity()
        self.train()

    def output_layers(self, index: int) -> list[nn.Module]:
        return [self.norm] if index == self.num_stages - 1 else []

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute the taps.

        Args:
            x: Images, ``(B, in_channels, H, W)``, any H and W. For padding see the class.

        Returns:
            One for each of ``out_indices``, according to ``out_type``: a map
            ``(B, C, ceil(H / patch_size), ceil(W / patch_size))``, or one vector ``(B, C)``.
        """
        valid = valid_size(x) if len(self.granularities) > 1 else None
        x, grid = self.embed(x)  # B, N, C
        num_prefix_tokens = int(self.cls_token is not None)
        layout = self.blocks[0].layout(grid, num_prefix_tokens, x.device)
        padding = None if valid is None else padding_regions(valid, self.patch_size, layout)
        taps, gates = [], []
        for i, block in enumerate(self.blocks):
            x, decisions = run_blocks([block], x, layout, padding, self.with_cp)
            gates += decisions.gates
            if i in self.out_indices:
                taps.append(self._tap(i, x, grid))
        stages = [(self.block_widths, decisions._replace(gates=gates))]
        publish_budget(self.budget, stages, [self.patch_widths], valid)
        return join_maps(taps)

    def _tap(self, index: int, x: Tensor, grid: tuple[int, int]) -> Tensor:
        if index == self.num_stages - 1:
            x = self.norm(x)
        if self.out_type == 'cls_token':
            return x[:, 0]
        tokens = x[:, x.shape[1] - grid[0] * grid[1] :]
        if self.out_type == 'avg_featmap':
            return tokens.mean(dim=1)
        return to_map(tokens.unflatten(1, grid))
