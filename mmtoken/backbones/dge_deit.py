"""DGE on plain ViT.

Source: DGE, arXiv 2301.03831; released code github.com/StevenGrove/vtpack (Apache-2.0). Parameter
names are timm's, but for ``attn.q`` and ``attn.kv``, which are ``attn.qkv`` there.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from ..arguments import as_tuple
from ..layers.common.padding import padding_regions, valid_size
from ..layers.common.regions import make_region_layout
from ..layers.common.vit import NORM_EPS
from ..layers.dge.block import DynamicGranularityBlock, TrainMode
from ..layers.dge.spatial_reduction import SpatialReductionAttention
from ..losses.usage import BUDGET, build_budget, counted_pixels, publish_usage, usage_wanted
from ..registry import MODELS
from .base import PlainBackbone


class RoutingLayout(NamedTuple):
    """What the blocks of one forward pass share."""

    grid: tuple[int, int]
    valid: Tensor | None
    padding: Tensor | None
    measured: bool
    usages: list


@MODELS.register_module()
class DGEDeiT(PlainBackbone):
    """DeiT whose blocks choose, region by region, how finely they look.

    Padding: regions wholly in the padding of a batch are as coarse as can be and do not count,
    whatever their colour, where the sizes of images are known (:class:`mmtoken.TokenLossHook`,
    :func:`mmtoken.follow_image_sizes`, :func:`mmtoken.set_image_sizes`); regions that an image
    reaches into count as they are. Elsewhere trailing zeros are taken for padding, and the black
    lower part of an image too. As in the release, tokens of padding are keys like any others, and
    positions are resampled to the padded grid: maps, and a choice now and then, differ from those
    of the image alone.

    Args:
        arch: ``'tiny'``, ``'small'``, ``'base'``, or a dict with the keys ``embed_dims``,
            ``num_layers``, ``num_heads`` and ``feedforward_channels``.
        granularities: Sides of the cell that becomes one query, finest first, in tokens, beginning
            with 1. ``(1,)`` gives the dense twin: DeiT.
        region_size: Side of the region that chooses, in tokens.
        train_mode: How routers get their gradients, see
            :class:`~mmtoken.layers.dge.block.DynamicGranularityBlock`: ``'exact'``, ``'dense'`` or ``'sparse'``.
        budget: Config of the loss that keeps the number of queries down; with it, training needs
            :class:`mmtoken.TokenLossHook`. None leaves routers to the task's loss.
        kwargs: As for :class:`~mmtoken.backbones.base.PlainBackbone`, without ``num_registers`` and
            ``layer_scale``. Released DGE weights are of ``img_size=256`` and have a class token.

    Raises:
        ValueError: Bad argument values; the message says what is allowed.
        TypeError: ``arch`` is neither a name nor a dict.
    """

    twin_args = dict(granularities=(1,), budget=None)
    fixed_args = ('num_registers', 'layer_scale')
    ratio_name = 'query_ratio'
    ignorable_keys = rf'{PlainBackbone.ignorable_keys}|budget\..*'
    newly_initialized_keys = r'budget\..*'

    def __init__(
        self,
        arch: str | Mapping = 'small',
        granularities: Sequence[int] = (1, 2, 4),
        region_size: int = 4,
        train_mode: TrainMode = 'exact',
        budget: dict | None = BUDGET,
        **kwargs,
    ) -> None:
        super().__init__(arch, **kwargs)
        self.stride = self.patch_size
        self.in_channels = self.patch_embed.proj.in_channels
        self.granularities = as_tuple(granularities)
        self.region_size = region_size
        self.budget = build_budget(budget, self.granularities)
        args = self.block_args
        self.blocks = nn.ModuleList(
            DynamicGranularityBlock(
                args['embed_dims'],
                SpatialReductionAttention(
                    args['embed_dims'], args['num_heads'], 1, args['qkv_bias'], counted_products=2
                ),
                args['feedforward_channels'], self.granularities, region_size, train_mode, rate,
                NORM_EPS, self.with_cp,
            )
            for rate in self.drop_rates
        )  # fmt: skip
        self.finish_init()

    def reduce(self, x: Tensor) -> tuple[Tensor, 'RoutingLayout']:
        routed = len(self.granularities) > 1
        valid = valid_size(x) if routed else None
        tokens, dense = self.embed(x)
        padding = None
        if routed:
            regions = make_region_layout(
                dense.grid, self.granularities, self.region_size, self.num_prefix_tokens, x.device
            )
            padding = padding_regions(valid, self.stride, regions)
        measured = routed and usage_wanted(self.budget, self.training)
        return tokens, RoutingLayout(dense.grid, valid, padding, measured, [])

    def run_block(
        self, index: int, tokens: Tensor, layout: 'RoutingLayout'
    ) -> tuple[Tensor, 'RoutingLayout']:
        tokens, usage = self.blocks[index](tokens, layout.grid, layout.padding, layout.measured)
        layout.usages.append(usage)
        return tokens, layout

    def finish(self, layout: 'RoutingLayout') -> None:
        if layout.measured:
            constant = self.constant_complexity(layout.valid, torch.float32)
            publish_usage([layout.usages], constant, self.budget)

    def constant_complexity(
        self, valid: Tensor, dtype: torch.dtype = torch.float64
    ) -> Tensor | float:
        """What the budget counts beside the blocks: the patch embedding, and a classifier if any.

        Args:
            valid: Sizes of the images, ``(B, 2)``, in pixels.
            dtype: Of the result.

        Returns:
            ``(B,)``.
        """
        if self.budget is None:
            return 0.0
        pixels = counted_pixels(valid, self.in_channels, self.budget.legacy, dtype)
        dims = self.pos_embed.shape[-1]
        return self.in_channels * pixels * dims + dims * self.budget.num_classes
