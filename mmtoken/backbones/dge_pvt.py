"""DGE on Pyramid Vision Transformers, with spatial-reduction and with deformable attention.

Sources: DGE, arXiv 2301.03831, PVT, arXiv 2102.12122. The released code of DGE
(github.com/StevenGrove/vtpack, Apache-2.0) has PVT with dynamic granularity for classification, and
deformable PVT without; both for whole regions only.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, get_args

import torch
import torch.nn as nn
from timm.layers import to_2tuple
from torch import Tensor

from ..arguments import as_tuple
from ..layers.common.padding import valid_size
from ..layers.common.utils import join_maps, to_map
from ..layers.dge.block import DynamicGranularityBlock, TrainMode
from ..layers.dge.deformable import DeformableAttention
from ..layers.dge.spatial_reduction import SpatialReductionAttention
from ..layers.dge.stage import DynamicGranularityStage
from ..losses.usage import BUDGET, build_budget, counted_pixels, publish_usage, usage_wanted
from ..registry import MODELS
from .base import TokenBackbone, check_out_type, resolve_arch

OutType = Literal['map', 'cls_token', 'avg_featmap']

PATCH_SIZES = (4, 2, 2, 2)
WIDTHS = dict(embed_dims=(64, 128, 320, 512), num_heads=(1, 2, 5, 8), mlp_ratios=(8, 8, 4, 4))
DEPTHS = dict(tiny=(2, 2, 2, 2), small=(3, 4, 6, 3), medium=(3, 4, 18, 3), large=(3, 8, 27, 3))


@MODELS.register_module()
class DGEPVT(TokenBackbone):
    """PVT whose blocks choose, region by region, how finely they look.

    Maps are those of PVT: strides 4, 8, 16 and 32, without a norm.

    Padding: regions wholly in the padding of a batch are as coarse as can be and do not count,
    whatever their colour, where the sizes of images are known (:class:`mmtoken.TokenLossHook`,
    :func:`mmtoken.follow_image_sizes`, :func:`mmtoken.set_image_sizes`); regions that an image
    reaches into count as they are. Elsewhere trailing zeros are taken for padding, and the black
    lower part of an image too. As in the release, tokens of padding are keys like any others, and
    positions are resampled to the padded grid: maps, and a choice now and then, differ from those
    of the image alone.

    Args:
        arch: ``'tiny'``, ``'small'``, ``'medium'``, ``'large'``, or a dict with the keys
            ``embed_dims``, ``depths``, ``num_heads``, ``mlp_ratios`` and ``sr_ratios``, of one
            value per stage.
        granularities: Sides of the cell that becomes one query, finest first, in tokens, beginning
            with 1. ``(1,)`` gives the dense twin: PVT.
        region_size: Side of the region that chooses, in tokens.
        train_mode: How routers get their gradients, see
            :class:`~mmtoken.layers.dge.block.DynamicGranularityBlock`: ``'exact'``, ``'dense'`` or ``'sparse'``.
        budget: Config of the loss that keeps the number of queries down; with it, training needs
            :class:`mmtoken.TokenLossHook`. None leaves routers to the task's loss.
        cls_token: Whether the last stage has a class token, as the release has; PVT's detectors
            and segmentors have none.
        pretrain_img_size: Image that position embeddings are laid out for, in pixels: a side, or
            ``(H, W)``. Images of any size are accepted. Released DGE weights are of 256.
        in_channels: Channels of the image.
        qkv_bias: Biases for queries, keys and values.
        drop_path_rate: Stochastic depth of the last block, rising linearly from 0.
        out_indices: Stages whose maps are returned, in rising order.
        out_type: ``'map'``; for classification ``'cls_token'``, the normalised class token of the
            last stage, or ``'avg_featmap'``, the mean over its normalised tokens.
        frozen_stages: Stages kept fixed: 0 freezes the first patch and position embedding, 1 the
            first stage too, and so on; -1 freezes nothing.
        norm_eval: Of no effect here, since there is no batch norm.
        with_cp: Recompute the activations of each block in backward.
        init_cfg: MMEngine's initialisation config.

    Raises:
        ValueError: Bad argument values; the message says what is allowed.
        TypeError: ``arch`` is neither a name nor a dict.
    """

    stem_names = ('layers.0.patch_embed', 'layers.0.pos_embed')
    twin_args = dict(granularities=(1,), budget=None)
    ratio_name = 'query_ratio'
    ignorable_keys = r'(norm|head|budget)\..*|layers\.\d+\.cls_token'
    newly_initialized_keys = r'budget\..*'
    arch_keys = ('embed_dims', 'depths', 'num_heads', 'mlp_ratios', 'sr_ratios')
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
        arch = check_stages(resolve_arch(arch, self.arch_zoo, self.arch_keys))
        dims, depths = arch['embed_dims'], arch['depths']
        super().__init__(len(dims), out_indices, frozen_stages, norm_eval, init_cfg)
        check_out_type(out_type, get_args(OutType), self.out_indices, len(dims) - 1, cls_token)
        self.out_type = out_type
        self.granularities = as_tuple(granularities)
        if cls_token and arch.get('sr_ratios', (1,))[-1] != 1:
            raise ValueError(
                f'a class token needs sr_ratio 1 in the last stage, got {arch["sr_ratios"][-1]}'
            )
        self.out_channels = tuple(dims[i] for i in self.out_indices)
        self.in_channels = in_channels
        self.budget = build_budget(budget, self.granularities)

        rates = torch.linspace(0, drop_path_rate, sum(depths), device='cpu').tolist()
        self.layers = nn.ModuleList()
        side, stride = to_2tuple(pretrain_img_size), 1
        for i, patch_size in enumerate(PATCH_SIZES[: self.num_built]):
            side, stride = tuple(-(-s // patch_size) for s in side), stride * patch_size
            blocks = [
                DynamicGranularityBlock(
                    dims[i],
                    self.make_attention(arch, i, qkv_bias),
                    dims[i] * arch['mlp_ratios'][i],
                    self.granularities,
                    region_size,
                    train_mode,
                    drop_path=rates.pop(0),
                    with_cp=with_cp,
                )
                for _ in range(depths[i])
            ]
            before = dims[i - 1] if i else in_channels
            last = i == len(dims) - 1
            self.layers.append(
                DynamicGranularityStage(
                    before, patch_size, stride, side, blocks, cls_token and last
                )
            )
        self.norm = nn.LayerNorm(dims[-1], 1e-6) if self.out_type != 'map' else nn.Identity()
        self.train()

    def make_attention(self, arch: Mapping, stage: int, qkv_bias: bool) -> nn.Module:
        """The attention of a block of a stage."""
        return SpatialReductionAttention(
            arch['embed_dims'][stage], arch['num_heads'][stage], arch['sr_ratios'][stage], qkv_bias
        )

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
        routed = len(self.granularities) > 1
        measured = routed and usage_wanted(self.budget, self.training)
        valid = valid_size(x) if routed else None
        maps, usages = [], []
        for i, stage in enumerate(self.layers):
            tokens, cls_token, used = stage(x, valid, measured)
            usages.append(used)
            x = tokens.permute(0, 3, 1, 2)
            if i in self.out_indices:
                maps.append(self._output(tokens, cls_token))
        if measured:
            constant = self.constant_complexity(valid, torch.float32)
            publish_usage(usages, constant, self.budget)
        return join_maps(maps)

    def _output(self, tokens: Tensor, cls_token: Tensor) -> Tensor:
        if self.out_type == 'map':
            return to_map(tokens)
        if self.out_type == 'cls_token':
            return self.norm(cls_token[:, 0])
        return self.norm(tokens).mean(dim=(1, 2))

    def constant_complexity(self, valid: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        """What the budget counts beside the blocks: patch embeddings, and a classifier if told so.

        Args:
            valid: Sizes of the images, ``(B, 2)``, in pixels.
            dtype: Of the result.

        Returns:
            ``(B,)``.
        """
        if self.budget is None:
            return 0.0
        pixels = counted_pixels(valid, self.in_channels, self.budget.legacy, dtype)
        dims = self.layers[-1].embed_dims
        total = torch.full_like(pixels, dims * self.budget.num_classes)
        for stage in self.layers:
            total = total + pixels * stage.in_channels * stage.embed_dims
            pixels = pixels / stage.patch_size**2
            total = total + pixels * stage.embed_dims
        return total


@MODELS.register_module()
class DGEDPVT(DGEPVT):
    """Deformable PVT whose blocks choose, region by region, how finely they look.

    As :class:`mmtoken.DGEPVT`, with deformable attention
    (:mod:`mmtoken.layers.dge.deformable`) in place of spatial reduction, and without a class token.
    The release has the dense network alone; that a query samples around the middle of its cell is
    our reading.

    Padding: as there; a query sees little of it, as few places as it samples.

    Args:
        arch: ``'tiny'``, ``'small'``, or a dict with the keys ``embed_dims``, ``depths``,
            ``num_heads`` and ``mlp_ratios``.
        num_points: Places that each head samples for a query.
        kwargs: As for :class:`mmtoken.DGEPVT`, but for ``cls_token``.
    """

    arch_keys = ('embed_dims', 'depths', 'num_heads', 'mlp_ratios')
    arch_zoo: ClassVar[dict[str, dict]] = {
        name: dict(WIDTHS, depths=DEPTHS[name]) for name in ('tiny', 'small')
    }

    def __init__(self, arch: str | Mapping = 'small', num_points: int = 4, **kwargs) -> None:
        if kwargs.get('cls_token'):
            raise ValueError('deformable PVT has no class token, got cls_token=True')
        self.num_points = num_points  # before the blocks are made
        super().__init__(arch, **kwargs)

    def make_attention(self, arch: Mapping, stage: int, qkv_bias: bool) -> nn.Module:
        dims, heads = arch['embed_dims'][stage], arch['num_heads'][stage]
        return DeformableAttention(dims, heads, self.num_points)


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
        if dims % heads:
            raise ValueError(f'embed_dims {dims} is no multiple of num_heads {heads}')
    return arch
