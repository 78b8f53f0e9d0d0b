"""DGE on plain ViT.

Source: DGE, arXiv 2301.03831; released code github.com/StevenGrove/vtpack (Apache-2.0). Parameter
names are timm's; blocks with a router have ``attn.q`` and ``attn.kv`` where timm has ``attn.qkv``.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch.nn as nn
from timm.layers import Mlp
from torch import Tensor

from ..arguments import as_tuple
from ..layers.common.padding import padding_regions, valid_size
from ..layers.common.regions import turn_cells
from ..layers.common.vit import ViTBlock
from ..layers.dge.block import DynamicGranularityBlock, Routing, TrainMode
from ..layers.dge.shared_router import SharedRouter, split_router_args
from ..layers.dge.spatial_reduction import SpatialReductionAttention
from ..layers.dge.stage import Decisions
from ..losses.budget import BUDGET, BlockWidths, PatchWidths, build_budget, publish_budget
from ..losses.label_purity import build_label_loss, publish_label_loss
from ..registry import MODELS
from .vit_base import TRUNK_OPTIONS, TRUNKS, DenseLayout, PlainBackbone


class RoutedLayout(NamedTuple):
    """What the blocks of one forward pass share.

    Attributes:
        grid: ``(H, W)``, in tokens.
        valid: Sizes of the images, ``(B, 2)``, in pixels.
        decisions: The regions, and what the blocks so far chose for them.
        shared: The choice of a router that all blocks share; None if each has its own.
    """

    grid: tuple[int, int]
    valid: Tensor
    decisions: Decisions
    shared: Routing | None = None


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
        router: Arguments of one router, which chooses before the first block for all of them,
            instead of a router in each: ``query_ratio``, the queries over tokens that each image
            has at most, so that all images cost the same and ``budget`` is not used;
            ``label_loss``, config of :class:`mmtoken.LabelPurityLoss`, with which labels teach the
            router (with ``query_ratio`` they alone do); and those of
            :class:`~mmtoken.layers.common.gate.RegionGate`.
        kwargs: As for :class:`~mmtoken.backbones.vit_base.PlainBackbone`, without ``layer_scale``.
            Released DGE weights are for ``img_size=256`` and have a class token.

    Raises:
        ValueError: Invalid argument values; the message says what is allowed.
        TypeError: ``arch`` is neither a name nor a dict.

    Example:
        >>> import torch
        >>> arch = dict(embed_dims=32, num_layers=2, num_heads=2, feedforward_channels=64)
        >>> model = DGEDeiT(arch, out_indices=(0, 1)).eval()
        >>> [tuple(m.shape) for m in model(torch.zeros(1, 3, 64, 96))]
        [(1, 32, 4, 6), (1, 32, 4, 6)]
    """

    fixed_args = ('layer_scale',)
    arch_options = TRUNK_OPTIONS
    arch_zoo = PlainBackbone.arch_zoo | TRUNKS
    ratio_name = DynamicGranularityBlock.ratio_name
    twin_args = dict(granularities=(1,), budget=None)
    ignorable_keys = rf'{PlainBackbone.ignorable_keys}|(budget|label_loss)\..*'
    newly_initialized_keys = r'(budget|label_loss|router)\..*'

    def __init__(
        self,
        arch: str | Mapping = 'small',
        granularities: Sequence[int] = (1, 2, 4),
        region_size: int = 4,
        train_mode: TrainMode = 'exact',
        budget: dict | None = BUDGET,
        router: Mapping | None = None,
        **kwargs,
    ) -> None:
        super().__init__(arch, **kwargs)
        self.granularities = as_tuple(granularities)
        self.region_size = region_size
        self.router = self.label_loss = None
        if self.is_routed and router is not None:
            args, label_loss, budget = split_router_args(router, budget)
            self.label_loss = build_label_loss(label_loss)
            self.router = SharedRouter(self.embed_dims, self.granularities, region_size, **args)
        self.budget = build_budget(budget, self.granularities)
        if self.is_routed:
            args, dims = self.block_args, self.embed_dims
            attn = args['num_heads'], 1, args['qkv_bias'], self.qk_norm
            shared = {name: args[name] for name in ('feedforward_channels', 'norm_eps', 'mlp')}
            self.blocks = nn.ModuleList(
                DynamicGranularityBlock(
                    dims, SpatialReductionAttention(dims, *attn),
                    granularities=self.granularities, region_size=region_size,
                    train_mode=train_mode, drop_path=rate, has_router=self.router is None, **shared,
                )
                for rate in self.drop_rates
            )  # fmt: skip
            self.block_widths = BlockWidths.of(self.blocks[0], attn_products=2)
            if self.mlp_layer is not Mlp:  # three products where an MLP has two
                hidden = self.block_widths.feedforward_channels
                self.block_widths = self.block_widths._replace(feedforward_channels=1.5 * hidden)
            in_channels = self.patch_embed.proj.in_channels
            self.patch_widths = PatchWidths(in_channels, dims, self.patch_size, has_norm=False)
        else:
            self.blocks = nn.ModuleList(
                ViTBlock(drop_path=rate, **self.block_args) for rate in self.drop_rates
            )
        self.finish_init()

    @property
    def is_routed(self) -> bool:
        """Whether blocks have routers; otherwise this is the dense twin."""
        return self.granularities != (1,)

    def reduce(self, x: Tensor) -> tuple[Tensor, DenseLayout | RoutedLayout]:
        tokens, dense = self.embed(x)
        if not self.is_routed:
            return tokens, dense
        valid = valid_size(x)
        regions = self.blocks[0].layout(dense.grid, self.num_prefix_tokens, x.device)
        regions = turn_cells(regions, dense.rotation)
        padding = padding_regions(valid, self.patch_size, regions)
        shared = None
        if self.router is not None:
            shared, scores = self.router(tokens, regions, padding, len(self.blocks))
            sides = [side * self.patch_size for side in self.granularities]
            region = self.region_size * self.patch_size
            publish_label_loss(self.label_loss, scores, x, sides, region, self.router.training)
        return tokens, RoutedLayout(dense.grid, valid, Decisions(regions, padding, []), shared)

    def run_block(
        self, index: int, tokens: Tensor, layout: DenseLayout | RoutedLayout
    ) -> tuple[Tensor, DenseLayout | RoutedLayout]:
        if not self.is_routed:
            return super().run_block(index, tokens, layout)
        regions, padding, gates, _ = layout.decisions
        routing = layout.shared
        if routing is None:
            routing = self.blocks[index].route(tokens, regions, padding)
        tokens = self.checkpoint(self.blocks[index], tokens, regions, routing)
        # torch.compile loses the fields of a NamedTuple that _replace makes.
        decisions = Decisions(regions, padding, [*gates, routing.gates])
        return tokens, RoutedLayout(layout.grid, layout.valid, decisions, layout.shared)

    def frozen_modules(self) -> list[nn.Module | nn.Parameter]:
        """As for all backbones; a shared router is fixed with the stem, unless labels teach it."""
        frozen = super().frozen_modules()
        fixed = frozen and self.router is not None and self.label_loss is None
        return [*frozen, self.router] if fixed else frozen

    def finish(self, layout: DenseLayout | RoutedLayout) -> None:
        if self.is_routed:
            stages = [(self.block_widths, layout.decisions)]
            publish_budget(self.budget, stages, [self.patch_widths], layout.valid)
