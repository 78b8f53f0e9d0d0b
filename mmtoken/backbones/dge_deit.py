"""DGE on plain ViT.

Source: DGE, arXiv 2301.03831; released code github.com/StevenGrove/vtpack (Apache-2.0). Parameter
names are timm's, but for ``attn.q`` and ``attn.kv``, which are ``attn.qkv`` there.
"""

from collections.abc import Mapping, Sequence
from typing import get_args

import torch
import torch.nn as nn
from torch import Tensor

from ..arguments import as_tuple
from ..layers.common.padding import padding_regions, valid_size
from ..layers.common.regions import make_region_layout
from ..layers.common.utils import join_maps, to_map
from ..layers.common.vit import NORM_EPS
from ..layers.dge.block import DynamicGranularityBlock, TrainMode
from ..layers.dge.spatial_reduction import SpatialReductionAttention
from ..losses.usage import BUDGET, build_budget, counted_pixels, publish_usage, usage_wanted
from ..registry import MODELS
from .base import PlainBackbone, check_out_type
from .dge_pvt import OutType


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
        cls_token: Whether there is a class token, as in the release. Dense prediction needs none.
        img_size: Image that the position embedding is laid out for, in pixels: a side, or
            ``(H, W)``. Images of any size are accepted. Released DGE weights are of 256.
        patch_size: Side of a patch, in pixels.
        in_channels: Channels of the image.
        qkv_bias: Biases for queries, keys and values.
        drop_path_rate: Stochastic depth of the last block, rising linearly from 0.
        out_indices: Blocks that are tapped, in rising order; negative ones count from the end. The
            last block is normalised, as in mmpretrain.
        out_type: ``'map'``; for classification ``'cls_token'``, the normalised class token of the
            last block, or ``'avg_featmap'``, the mean over its normalised tokens.
        frozen_stages: Blocks kept fixed: 0 freezes the patch and position embedding, 1 the first
            block too, and so on; -1 freezes nothing.
        norm_eval: Of no effect here, since there is no batch norm.
        with_cp: Recompute the activations of each block in backward.
        init_cfg: MMEngine's initialisation config.

    Raises:
        ValueError: Bad argument values; the message says what is allowed.
        TypeError: ``arch`` is neither a name nor a dict.
    """

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
        self.stride = patch_size
        self.in_channels = in_channels
        self.granularities = as_tuple(granularities)
        self.region_size = region_size
        self.budget = build_budget(budget, self.granularities)
        rates = torch.linspace(0, drop_path_rate, depth, device='cpu').tolist()
        self.blocks = nn.ModuleList(
            DynamicGranularityBlock(
                dims, SpatialReductionAttention(dims, heads, 1, qkv_bias, counted_products=2),
                arch['feedforward_channels'], self.granularities, region_size, train_mode, rate,
                NORM_EPS, with_cp,
            )
            for rate in rates[: self.num_built]
        )  # fmt: skip
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
        routed = len(self.granularities) > 1
        measured = routed and usage_wanted(self.budget, self.training)
        valid = valid_size(x) if routed else None
        x, grid = self.embed(x)
        num_prefix_tokens = x.shape[1] - grid[0] * grid[1]
        padding = None
        if routed:
            regions = make_region_layout(
                grid, self.granularities, self.region_size, num_prefix_tokens, x.device
            )
            padding = padding_regions(valid, self.stride, regions)
        taps, usages = [], []
        for i, block in enumerate(self.blocks):
            x, usage = block(x, grid, padding, measured)
            usages.append(usage)
            if i in self.out_indices:
                taps.append(self._tap(i, x, grid))
        if measured:
            constant = self.constant_complexity(valid, torch.float32)
            publish_usage([usages], constant, self.budget)
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
