"""Blocks of dynamic granularity behind any backbone.

Source: DGE, arXiv 2301.03831; as a neck it is our own.
"""

from collections.abc import Sequence

import torch.nn as nn
from torch import Tensor

from ..arguments import as_tuple
from ..checkpoints.module import CheckpointedModule
from ..layers.common.padding import noted_sizes, padding_regions
from ..layers.common.regions import make_region_layout
from ..layers.common.utils import init_own, to_map
from ..layers.dge.block import DynamicGranularityBlock, TrainMode
from ..layers.dge.spatial_reduction import SpatialReductionAttention
from ..losses.usage import BUDGET, build_budget, publish_usage, usage_wanted
from ..registry import MODELS
from .simple_feature_pyramid import XAVIER, Norm, SimpleFeaturePyramid

INIT = [dict(type='TruncNormal', layer='Linear', std=0.02), XAVIER]


@MODELS.register_module()
class GrainUnpoolNeck(CheckpointedModule):
    """Refine maps by transformer blocks that choose, region by region, how finely they look.

    Queries are few, and what becomes of them is un-pooled onto the map, see
    :class:`~mmtoken.layers.dge.block.DynamicGranularityBlock`. With one map, of stride 16, a pyramid follows;
    with several, each is refined and goes on as it is, for example to an ``FPN``::

        neck=[
            dict(type='mmtoken.GrainUnpoolNeck', in_channels=[256, 512, 1024, 2048],
                 num_heads=[4, 8, 16, 32], sr_ratios=[8, 4, 2, 1]),
            dict(type='FPN', in_channels=[256, 512, 1024, 2048], out_channels=256, num_outs=5),
        ]

    Padding: the neck sees no image. Behind a backbone in a model of OpenMMLab it learns from data
    samples where images end, see :func:`mmtoken.follow_image_sizes`, and regions wholly beyond are
    as coarse as can be and do not count. Otherwise, and behind another neck, padding counts like
    anything else. In either case all tokens of a map are keys, those of padding too.

    Args:
        in_channels: Channels of the one map, or of each of several.
        num_heads: Attention heads, for all maps or for each.
        depth: Blocks for each map.
        sr_ratios: Side of the patch that becomes one key, in tokens, for all maps or for each.
        mlp_ratio: Hidden channels of an MLP over those of its map.
        granularities, region_size, train_mode: As for
            :class:`~mmtoken.layers.dge.block.DynamicGranularityBlock`. ``(1,)`` gives the dense twin.
        budget: Config of the loss that keeps the number of queries down; with it, training needs
            :class:`mmtoken.TokenLossHook`. None leaves routers to the task's loss.
        qkv_bias: Biases for queries, keys and values.
        drop_path_rate: Stochastic depth of every block.
        with_cp: Recompute the activations of each block in backward.
        out_channels, num_outs, norm: The pyramid behind one map, see
            :class:`mmtoken.SimpleFeaturePyramid`.
        init_cfg: MMEngine's initialisation config. Routers start as they should in any case.

    Raises:
        ValueError: Bad argument values; the message says what is allowed.
    """

    twin_args = dict(granularities=(1,), budget=None)

    def __init__(
        self,
        in_channels: int | Sequence[int],
        num_heads: int | Sequence[int],
        depth: int = 2,
        sr_ratios: int | Sequence[int] = 1,
        mlp_ratio: float = 4.0,
        granularities: Sequence[int] = (1, 2, 4),
        region_size: int = 4,
        train_mode: TrainMode = 'exact',
        budget: dict | None = BUDGET,
        qkv_bias: bool = True,
        drop_path_rate: float = 0.0,
        with_cp: bool = False,
        out_channels: int = 256,
        num_outs: int = 5,
        norm: Norm = 'LN',
        init_cfg: dict | list[dict] | None = INIT,
    ) -> None:
        super().__init__(init_cfg)
        granularities = as_tuple(granularities)
        widths = [in_channels] if isinstance(in_channels, int) else list(in_channels)
        heads = _for_each('num_heads', num_heads, len(widths))
        ratios = _for_each('sr_ratios', sr_ratios, len(widths))
        if depth < 1:
            raise ValueError(f'depth must be 1 or more, got {depth}')
        for dims, count in zip(widths, heads, strict=True):
            if dims % count:
                raise ValueError(f'in_channels {dims} is no multiple of num_heads {count}')
        self.in_channels = widths
        self.stages = nn.ModuleList(
            nn.ModuleList(
                DynamicGranularityBlock(
                    dims,
                    SpatialReductionAttention(dims, count, ratio, qkv_bias),
                    int(dims * mlp_ratio),
                    granularities,
                    region_size,
                    train_mode,
                    drop_path=drop_path_rate,
                    with_cp=with_cp,
                )
                for _ in range(depth)
            )
            for dims, count, ratio in zip(widths, heads, ratios, strict=True)
        )
        self.budget = build_budget(budget, granularities)
        self.pyramid = None
        if isinstance(in_channels, int):
            self.pyramid = SimpleFeaturePyramid(
                in_channels, out_channels, num_outs, norm=norm, init_cfg=None
            )

    def init_fresh(self) -> None:
        super().init_fresh()
        init_own(self.stages)

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Refine the maps.

        Args:
            inputs: Maps ``(B, in_channels_i, H_i, W_i)``. Where there is one in ``in_channels``,
                the last of them is used.

        Returns:
            Maps in the same shapes; behind one map, as :class:`mmtoken.SimpleFeaturePyramid`.

        Raises:
            ValueError: Another number of maps.
        """
        if self.pyramid is not None:
            inputs = inputs[-1:]
        if len(inputs) != len(self.stages):
            raise ValueError(
                f'in_channels={self.in_channels} are of {len(self.stages)} maps, got {len(inputs)}'
            )
        measured = usage_wanted(self.budget, self.training)
        maps, usages = [], []
        for x, blocks in zip(inputs, self.stages, strict=True):
            grid = (x.shape[2], x.shape[3])
            padding = self.find_padding(x, blocks[0])
            tokens, used = x.flatten(2).transpose(1, 2).contiguous(), []
            for block in blocks:
                tokens, usage = block(tokens, grid, padding, measured)
                used.append(usage)
            maps.append(to_map(tokens.unflatten(1, grid)))
            usages.append(used)
        if measured:
            publish_usage(usages, 0.0, self.budget, prefix='neck_')
        return tuple(maps) if self.pyramid is None else self.pyramid(maps)

    def find_padding(self, x: Tensor, block: DynamicGranularityBlock) -> Tensor | None:
        """Regions of a map that are padding, ``(B, Hr, Wr)``; None if nobody told."""
        sizes = noted_sizes(x)
        if sizes is None or block.router is None:
            return None
        regions = make_region_layout(
            (x.shape[2], x.shape[3]), block.granularities, block.region_size, device=x.device
        )
        return padding_regions(sizes, 1, regions)


def _for_each(name: str, value: int | Sequence[int], number: int) -> list[int]:
    """One value for each of a number of maps."""
    values = [value] * number if isinstance(value, int) else list(value)
    if len(values) != number:
        raise ValueError(f'{name} must be one number or {number}, one for each map; got {values}')
    return values
