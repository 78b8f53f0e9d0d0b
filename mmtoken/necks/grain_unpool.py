"""Blocks of dynamic granularity behind any backbone.

Source: DGE, arXiv 2301.03831; its use as a neck is ours.
"""

from collections.abc import Sequence

import torch.nn as nn
from torch import Tensor

from ..arguments import as_tuple
from ..checkpoints.module import CheckpointedModule
from ..layers.common.padding import noted_sizes, padding_regions
from ..layers.common.utils import check_heads, init_own, to_map
from ..layers.dge.block import DynamicGranularityBlock, TrainMode
from ..layers.dge.spatial_reduction import SpatialReductionAttention
from ..layers.dge.stage import run_blocks
from ..losses.budget import BUDGET, BlockWidths, build_budget, publish_budget
from ..registry import MODELS
from .simple_feature_pyramid import TRANSFORMER_INIT, Norm, SimpleFeaturePyramid, check_channels


@MODELS.register_module()
class GrainUnpoolNeck(CheckpointedModule):
    """Refine maps by transformer blocks that select a token granularity for each region.

    Queries are few, and their updates are un-pooled onto the map, see
    :class:`~mmtoken.layers.dge.block.DynamicGranularityBlock`. One map, of stride 16, becomes a
    pyramid; several maps keep their shapes and can go on to, for example, an ``FPN``::

        neck=[
            dict(type='mmtoken.GrainUnpoolNeck', in_channels=[256, 512, 1024, 2048],
                 num_heads=[4, 8, 16, 32], sr_ratios=[8, 4, 2, 1]),
            dict(type='FPN', in_channels=[256, 512, 1024, 2048], out_channels=256, num_outs=5),
        ]

    Padding: the neck does not see the image. Behind a backbone in a model of OpenMMLab it takes the
    sizes of images from data samples, see :func:`mmtoken.follow_image_sizes`, and regions that lie
    wholly beyond them get the coarsest granularity and are not counted. Otherwise, and behind
    another neck, padding is treated as image. In both cases all tokens of a map are keys, also
    those of padding.

    Args:
        in_channels: Channels of the one map, or of each of several.
        num_heads: Attention heads, for all maps or for each.
        depth: Blocks for each map.
        sr_ratios: Side of the patch that becomes one key, in tokens, for all maps or for each.
        mlp_ratio: Hidden channels of an MLP over those of its map.
        granularities, region_size, train_mode: As for
            :class:`~mmtoken.layers.dge.block.DynamicGranularityBlock`. ``(1,)`` gives the dense
            twin.
        budget: Config of the loss that limits the number of queries; with it, training needs
            :class:`mmtoken.TokenLossHook`. None leaves routers to the loss of the task.
        qkv_bias: Biases of queries, keys and values.
        drop_path_rate: Stochastic depth of every block.
        with_cp: Recompute the activations of each block in backward.
        out_channels, num_outs, norm: The pyramid of one map, see
            :class:`mmtoken.SimpleFeaturePyramid`.
        init_cfg: MMEngine's initialization config. Routers have an initialization of their own.

    Raises:
        ValueError: Invalid argument values; the message says what is allowed.

    Example:
        >>> import torch
        >>> neck = GrainUnpoolNeck(in_channels=[8, 16], num_heads=[1, 2], depth=1).eval()
        >>> [tuple(m.shape) for m in neck([torch.zeros(1, 8, 12, 20), torch.zeros(1, 16, 6, 10)])]
        [(1, 8, 12, 20), (1, 16, 6, 10)]
    """

    ratio_name = DynamicGranularityBlock.ratio_name
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
        init_cfg: dict | list[dict] | None = TRANSFORMER_INIT,
    ) -> None:
        super().__init__(init_cfg)
        granularities = as_tuple(granularities)
        widths = [in_channels] if isinstance(in_channels, int) else list(in_channels)
        heads = _for_each('num_heads', num_heads, len(widths))
        ratios = _for_each('sr_ratios', sr_ratios, len(widths))
        if depth < 1:
            raise ValueError(f'depth must be 1 or more, got {depth}')
        self.in_channels = widths
        self.with_cp = with_cp
        self.stages = nn.ModuleList()
        for dims, count, ratio in zip(widths, heads, ratios, strict=True):
            check_heads(dims, count, 'in_channels: ')
            blocks = (
                DynamicGranularityBlock(
                    dims,
                    SpatialReductionAttention(dims, count, ratio, qkv_bias),
                    int(dims * mlp_ratio),
                    granularities,
                    region_size,
                    train_mode,
                    drop_path_rate,
                )
                for _ in range(depth)
            )
            self.stages.append(nn.ModuleList(blocks))
        self.block_widths = [BlockWidths.of(blocks[0]) for blocks in self.stages]
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
            inputs: Maps ``(B, in_channels_i, H_i, W_i)``. If ``in_channels`` is one number, the
                last of them is used.

        Returns:
            Maps in the same shapes; of one map, as :class:`mmtoken.SimpleFeaturePyramid`.

        Raises:
            ValueError: Another number of maps, or of channels.
        """
        if self.pyramid is not None:
            inputs = inputs[-1:]
        if len(inputs) != len(self.stages):
            raise ValueError(
                f'in_channels={self.in_channels} are of {len(self.stages)} maps, got {len(inputs)}'
            )
        maps, stages = [], []
        for x, width in zip(inputs, self.in_channels, strict=True):
            check_channels(self, width, x.shape[1])
        for x, blocks, widths in zip(inputs, self.stages, self.block_widths, strict=True):
            grid, sizes = (x.shape[2], x.shape[3]), noted_sizes(x)
            layout = blocks[0].layout(grid, 0, x.device)
            padding = None if sizes is None else padding_regions(sizes, 1, layout)
            tokens = x.flatten(2).transpose(1, 2).contiguous()  # B, H * W, C
            tokens, decisions = run_blocks(blocks, tokens, layout, padding, self.with_cp)
            stages.append((widths, decisions))
            maps.append(to_map(tokens.unflatten(1, grid)))
        publish_budget(self.budget, stages, prefix='neck_')
        return tuple(maps) if self.pyramid is None else self.pyramid(maps)


def _for_each(name: str, value: int | Sequence[int], number: int) -> list[int]:
    """One value for each of a number of maps."""
    values = [value] * number if isinstance(value, int) else list(value)
    if len(values) != number:
        raise ValueError(f'{name} must be one number or {number}, one for each map; got {values}')
    return values
