"""DGE on Pyramid Vision Transformers.

Sources: DGE, arXiv 2301.03831, PVT, arXiv 2102.12122. The released code of DGE
(github.com/StevenGrove/vtpack, Apache-2.0) has PVT with dynamic granularity for classification, for
whole regions only.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, get_args

import torch.nn as nn
from timm.layers import to_2tuple
from torch import Tensor

from ..arguments import as_tuple
from ..layers.common.cache import compile_for_size
from ..layers.common.padding import valid_size
from ..layers.common.utils import ceil_div, check_heads, drop_path_rates, join_maps, to_map
from ..layers.dge.block import DynamicGranularityBlock, TrainMode
from ..layers.dge.shared_router import SharedRouter, split_router_args
from ..layers.dge.spatial_reduction import SpatialReductionAttention
from ..layers.dge.stage import DynamicGranularityStage
from ..losses.budget import BUDGET, BlockWidths, PatchWidths, build_budget, publish_budget
from ..losses.label_purity import build_label_loss, publish_label_loss
from ..registry import MODELS
from .base import TokenBackbone, check_out_type

OutType = Literal['map', 'cls_token', 'avg_featmap']

PATCH_SIZES = (4, 2, 2, 2)
STRIDES = (4, 8, 16, 32)
WIDTHS = dict(embed_dims=(64, 128, 320, 512), num_heads=(1, 2, 5, 8), mlp_ratios=(8, 8, 4, 4))
DEPTHS = dict(tiny=(2, 2, 2, 2), small=(3, 4, 6, 3), medium=(3, 4, 18, 3), large=(3, 8, 27, 3))


@MODELS.register_module()
class DGEPVT(TokenBackbone):
    """PVT whose blocks select a token granularity for each region.

    Maps are those of PVT: strides 4, 8, 16 and 32, without a norm.

    Padding: regions that lie wholly in the padding of a batch get the coarsest granularity and are
    not counted, whatever their color, where image sizes are known (:class:`mmtoken.TokenLossHook`,
    :func:`mmtoken.follow_image_sizes`, :func:`mmtoken.set_image_sizes`); regions that an image
    reaches into count fully. Elsewhere trailing zeros are taken for padding, and so is the black
    lower part of an image. As in the release, tokens of padding are keys like any others, and
    positions are resampled to the padded grid. So maps, and occasionally a choice, differ from
    those of the image alone.

    Args:
        arch: ``'tiny'``, ``'small'``, ``'medium'``, ``'large'``, or a dict with the keys
            ``embed_dims``, ``depths``, ``num_heads``, ``mlp_ratios`` and ``sr_ratios``, of one
            value per stage.
        granularities: Sides of the cells that become one query, finest first, in tokens, starting
            with 1. ``(1,)`` gives the dense twin: PVT.
        region_size: Side of a region, in tokens.
        train_mode: How routers get their gradients, ``'exact'``, ``'dense'`` or ``'sparse'``, see
            :class:`~mmtoken.layers.dge.block.DynamicGranularityBlock`.
        budget: Config of the loss that limits the number of queries; with it, training needs
            :class:`mmtoken.TokenLossHook`. None leaves routers to the loss of the task.
        router: Arguments of one router for each stage, which chooses for all of its blocks, instead
            of a router in each; see :class:`mmtoken.DGEDeiT`. ``query_ratio`` may have a value for
            each stage: a region of a deep stage is large, and few of them have one label.
        cls_token: Whether the last stage has a class token, as the release has; PVT's detectors
            and segmentors have none.
        pretrain_img_size: Image size of the position embeddings, in pixels: a side, or ``(H, W)``.
            Images of any size are accepted. Released DGE weights are for 256.
        in_channels: Channels of the image.
        qkv_bias: Biases of queries, keys and values.
        drop_path_rate: Stochastic depth of the last block, rising linearly from 0.
        out_indices: Stages whose maps are returned, in rising order.
        out_type: ``'map'``; for classification ``'cls_token'``, the normalized class token of the
            last stage, or ``'avg_featmap'``, the mean of its normalized tokens.
        frozen_stages: Stages kept fixed: 0 freezes the first patch and position embedding, 1 the
            first stage too, and so on; -1 freezes nothing.
        norm_eval: Accepted for compatibility; unused, since there is no batch norm.
        with_cp: Recompute the activations of each block in backward.
        init_cfg: MMEngine's initialization config.

    Raises:
        ValueError: Invalid argument values; the message says what is allowed.
        TypeError: ``arch`` is neither a name nor a dict.

    Example:
        >>> import torch
        >>> arch = dict(
        ...     embed_dims=(8, 16), depths=(1, 1), num_heads=(1, 2), mlp_ratios=(2, 2),
        ...     sr_ratios=(2, 1),
        ... )
        >>> model = DGEPVT(arch, out_indices=(0, 1)).eval()
        >>> [tuple(m.shape) for m in model(torch.zeros(1, 3, 64, 96))]
        [(1, 8, 16, 24), (1, 16, 8, 12)]
    """

    ratio_name = DynamicGranularityBlock.ratio_name
    stem_names = ('layers.0.patch_embed', 'layers.0.pos_embed')
    twin_args = dict(granularities=(1,), budget=None)
    ignorable_keys = r'(norm|head|budget|label_loss)\..*|layers\.\d+\.cls_token'
    newly_initialized_keys = r'(budget|label_loss|layers\.\d+\.router)\..*'
    arch_keys = (*WIDTHS, 'depths', 'sr_ratios')
    arch_zoo: ClassVar[dict[str, dict]] = {
        name: dict(WIDTHS, depths=depths, sr_ratios=(8, 4, 2, 1)) for name, depths in DEPTHS.items()
    }

    def __init__(
        self,
        arch: str | Mapping = 'small',
        granularities: Sequence[int] = (1, 2, 4),
        region_size: int = 4,
        train_mode: TrainMode = 'exact',
        budget: dict | None = BUDGET,
        router: Mapping | None = None,
        cls_token: bool = False,
        pretrain_img_size: int | tuple[int, int] = 224,
        in_channels: int = 3,
        qkv_bias: bool = True,
        drop_path_rate: float = 0.1,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        out_type: OutType = 'map',
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        arch = check_stages(self.full_arch(arch))
        dims, last = arch['embed_dims'], len(arch['embed_dims']) - 1
        strides = STRIDES[: len(dims)]
        super().__init__(dims, strides, out_indices, frozen_stages, norm_eval, init_cfg)
        check_out_type(out_type, get_args(OutType), self.out_indices, last, cls_token)
        if cls_token and arch.get('sr_ratios', (1,))[-1] != 1:
            raise ValueError(
                f'a class token needs sr_ratio 1 in the last stage, got {arch["sr_ratios"][-1]}'
            )
        self.out_type = out_type
        self.granularities = as_tuple(granularities)
        self.region_size = region_size
        self.label_loss, router_args = None, None
        if router is not None and len(self.granularities) > 1:
            router_args, label_loss, budget = split_router_args(router, budget)
            query_ratios = ratio_of_stages(router_args.get('query_ratio'), last + 1)
            self.label_loss = build_label_loss(label_loss)
        self.budget = build_budget(budget, self.granularities)

        self.layers = nn.ModuleList()
        self.block_widths: list[BlockWidths] = []  # of each stage
        self.patch_widths: list[PatchWidths] = []
        rates = drop_path_rates(drop_path_rate, arch['depths'])
        side, channels = to_2tuple(pretrain_img_size), in_channels
        for i, patch_size in enumerate(PATCH_SIZES[: self.num_built]):
            side = tuple(ceil_div(s, patch_size) for s in side)
            blocks = [
                DynamicGranularityBlock(
                    dims[i],
                    self.make_attention(arch, i, qkv_bias),
                    dims[i] * arch['mlp_ratios'][i],
                    self.granularities,
                    region_size,
                    train_mode,
                    rate,
                    has_router=router_args is None,
                )
                for rate in rates[i]
            ]
            shared = None
            if router_args is not None:
                args = dict(router_args, query_ratio=query_ratios[i])
                shared = SharedRouter(dims[i], self.granularities, region_size, **args)
            has_token = cls_token and i == last
            self.layers.append(
                DynamicGranularityStage(
                    channels, patch_size, strides[i], side, blocks, has_token, with_cp, shared
                )
            )
            self.block_widths.append(BlockWidths.of(blocks[0]))
            self.patch_widths.append(PatchWidths(channels, dims[i], patch_size, has_norm=True))
            channels = dims[i]
        self.norm = nn.LayerNorm(dims[-1], 1e-6) if self.out_type != 'map' else nn.Identity()
        self.train()

    @staticmethod
    def make_attention(arch: Mapping, stage: int, qkv_bias: bool) -> nn.Module:
        """The attention of one block of a stage."""
        dims, heads = arch['embed_dims'][stage], arch['num_heads'][stage]
        return SpatialReductionAttention(dims, heads, arch['sr_ratios'][stage], qkv_bias)

    def output_layers(self, index: int) -> list[nn.Module]:
        return [self.norm]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute the maps.

        Args:
            x: Images, ``(B, in_channels, H, W)``, any H and W. For padding see the class.

        Returns:
            One map ``(B, C_i, ceil(H / stride_i), ceil(W / stride_i))`` for each of
            ``out_indices``, or one ``(B, C)`` according to ``out_type``.
        """
        compile_for_size(x)
        valid = valid_size(x) if len(self.granularities) > 1 else None
        maps, decisions, inputs = [], [], x
        for i, stage in enumerate(self.layers):
            tokens, cls_token, chosen = stage(inputs, valid)  # (B, H, W, C), (B, 0 or 1, C)
            if chosen.scores is not None:
                sides = [side * stage.stride for side in self.granularities]
                region = self.region_size * stage.stride
                publish_label_loss(
                    self.label_loss, chosen.scores, x, sides, region, stage.router.training
                )
            decisions.append(chosen)
            inputs = tokens.permute(0, 3, 1, 2)
            if i in self.out_indices:
                maps.append(self._output(tokens, cls_token))
        stages = list(zip(self.block_widths, decisions, strict=True))
        publish_budget(self.budget, stages, self.patch_widths, valid)
        return join_maps(maps)

    def _output(self, tokens: Tensor, cls_token: Tensor) -> Tensor:
        if self.out_type == 'map':
            return to_map(tokens)
        if self.out_type == 'cls_token':
            return self.norm(cls_token[:, 0])
        return self.norm(tokens).mean(dim=(1, 2))

    @classmethod
    def library_baseline(cls, args: Mapping) -> dict | None:
        """mmdet's PVT, which has heads of one width, no class token, and outputs maps only."""
        arch, stages = args['arch'], len(args['arch']['depths'])
        widths = zip(arch['embed_dims'], arch['num_heads'], strict=True)
        head_dims = {dims // heads for dims, heads in widths}
        if len(head_dims) > 1 or args['cls_token'] or args['out_type'] != 'map':
            return None
        same = ('in_channels', 'qkv_bias', 'drop_path_rate', 'out_indices')
        return dict(
            type=('mmdet.PyramidVisionTransformer',),
            pretrain_img_size=to_2tuple(args['pretrain_img_size']),
            embed_dims=head_dims.pop(),
            num_stages=stages,
            num_layers=arch['depths'],
            patch_sizes=PATCH_SIZES[:stages],
            strides=PATCH_SIZES[:stages],
            paddings=(0,) * stages,
            **{name: args[name] for name in same},
            **{name: arch[name] for name in ('num_heads', 'mlp_ratios', 'sr_ratios')},
        )


def ratio_of_stages(
    query_ratio: float | Sequence[float] | None, num_stages: int
) -> Sequence[float | None]:
    """A query ratio for each stage.

    Raises:
        ValueError: There are not as many as stages.
    """
    if not isinstance(query_ratio, (list, tuple)):
        return (query_ratio,) * num_stages
    if len(query_ratio) != num_stages:
        raise ValueError(
            f'query_ratio is one number or {num_stages}, one for each stage, got {query_ratio}'
        )
    return query_ratio


def check_stages(arch: dict) -> dict:
    """Refuse architectures whose stages do not agree.

    Raises:
        ValueError: Values for different numbers of stages, more than there are patch sizes, or
            widths that heads do not divide.
    """
    numbers = {name: len(values) for name, values in arch.items()}
    if len(set(numbers.values())) > 1 or not 1 <= min(numbers.values()) <= len(PATCH_SIZES):
        raise ValueError(
            f'an arch has one value per stage, of 1 to {len(PATCH_SIZES)} stages, got {numbers}'
        )
    for dims, heads in zip(arch['embed_dims'], arch['num_heads'], strict=True):
        check_heads(dims, heads)
    return arch
