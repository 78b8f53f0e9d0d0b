"""PSViT: tokens pooled over depth, and layers that share attention maps.

Source: PSViT, arXiv 2108.03428. No code was released; for what is not specified in the abstract see
:class:`PSViT`.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch.nn as nn
from timm.models import FeatureInfo
from torch import Tensor

from ..arguments import as_tuple, is_count
from ..layers.common.cache import compile_for_size
from ..layers.common.utils import ceil_div, check_heads, drop_path_rates, join_maps, to_map
from ..layers.common.vit import NORM_EPS
from ..layers.psvit.pooling import Pooling, TokenPooling, token_unpooling, unpool_map
from ..layers.psvit.sharing import SharingStage
from ..registry import MODELS
from ..runtime.decisions import record_rectangles
from .vit_base import PatchBackbone


@MODELS.register_module()
class PSViT(PatchBackbone):
    """ViT whose tokens are pooled between stages, and whose layers share attention maps in groups.

    The first layer of a group computes the map; the others have values, an output projection and an
    MLP. Maps have strides 8, 16 and 32 and are normalized.

    From the paper's abstract: tokens are pooled over depth, twice; consecutive layers use one
    attention map; the layout is found by a search, for networks of about the cost of DeiT. Not
    specified there and therefore our choice: the pooling operator and the channels behind it; the
    groups, widths and depths of the zoo; that a sharing layer lacks queries, keys and the softmax
    and nothing else; pre-norm; the patch size, the windows, the output norms and the stride-4 map
    for dense prediction.

    Padding: the padding of a batch is treated like the image. Positions are resampled to the padded
    grid, and the third stage attends to all of it, so the maps of an image differ, everywhere, from
    those it has alone.

    Args:
        arch: ``'tiny'``, ``'small'``, or a dict with the key ``stages``: for each stage
            ``(embed_dims, num_heads, groups)``, where groups are the numbers of layers that share a
            map: ``(2, 2, 1)`` are five layers, of which three compute one.
        pooling: Between stages, beside a convolution that widens the tokens: ``'max'`` or
            ``'mean'`` of 3 x 3 tokens, or ``'conv'``, a stride of that convolution.
        pool_kernel: Of that convolution, 3 or 1.
        sharing: Whether layers share maps. ``None`` or False gives the dense twin: every layer has
            a map of its own.
        window_sizes: For each stage, or one for all, the side of the windows that limit attention,
            in tokens, or None for global attention. By default the second stage is one window in
            images of up to 512 pixels, and the third always is.
        img_size: Image that the position embedding is laid out for, in pixels: a side, or
            ``(H, W)``. Images of any size are accepted.
        patch_size: Side of a patch, in pixels; it is the first stage's stride.
        in_channels: Channels of the image.
        qkv_bias: Biases of queries, keys and values.
        mlp_ratio: Hidden width of the MLPs over the channels.
        drop_path_rate: Stochastic depth of the last layer, rising linearly from 0.
        out_indices: Stages whose maps are returned, in rising order.
        finest_map: Return a map of half the first stride too, before the others, made from that of
            the first stage by a transposed convolution: detectors want strides from 4.
        frozen_stages: Stages kept fixed: 0 freezes the patch and position embedding, 1 the first
            stage too, and so on; -1 freezes nothing.
        norm_eval: Accepted for compatibility; unused, since there is no BatchNorm.
        with_cp: Recompute the activations of each group in backward.
        init_cfg: MMEngine's initialization config.

    Raises:
        ValueError: Bad argument values; the message says what is allowed.
        TypeError: ``arch`` is neither a name nor a dict.

    Example:
        >>> import torch
        >>> arch = dict(stages=[(32, 2, (2,)), (64, 2, (2, 1))])
        >>> backbone = PSViT(arch, window_sizes=7, out_indices=(0, 1))
        >>> [tuple(m.shape) for m in backbone(torch.zeros(1, 3, 64, 96))]
        [(1, 32, 8, 12), (1, 64, 4, 6)]
    """

    stages_name = 'layers'
    twin_args = dict(sharing=None)
    # Other outputs may have been asked for before.
    ignorable_keys = r'(norm\d|finest)\..*'
    newly_initialized_keys = r'(norm\d|finest)\..*'
    arch_keys = ('stages',)
    arch_zoo: ClassVar[dict[str, dict]] = dict(
        tiny=dict(stages=[(96, 2, (2,)), (192, 3, (2, 2, 2)), (384, 6, (2, 2))]),
        small=dict(stages=[(192, 3, (2,)), (384, 6, (2, 2, 2)), (768, 12, (2, 2))]),
    )

    def __init__(
        self,
        arch: str | Mapping = 'small',
        pooling: Pooling = 'max',
        pool_kernel: int = 3,
        sharing: bool | None = True,
        window_sizes: Sequence[int | None] = (14, 32, None),
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 8,
        in_channels: int = 3,
        qkv_bias: bool = True,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        out_indices: Sequence[int] = (0, 1, 2),
        finest_map: bool = False,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        stages = self.resolve_arch(arch)['stages']
        if sharing not in (True, False, None):
            raise ValueError(f'sharing must be True, False or None, got {sharing!r}')
        window_sizes = as_tuple(window_sizes)
        if len(window_sizes) == 1:
            window_sizes *= len(stages)
        check_windows(window_sizes, len(stages))
        channels = [dims for dims, _, _ in stages]
        strides = [patch_size * 2**i for i in range(len(stages))]
        super().__init__(channels, strides, out_indices, frozen_stages, norm_eval, init_cfg)
        self.make_stem(channels[0], img_size, patch_size, in_channels)
        depths = [sum(groups) for _, _, groups in stages]
        rates = drop_path_rates(drop_path_rate, depths)
        self.layers = nn.ModuleList()
        for i, (dims, heads, groups) in enumerate(stages[: self.num_built]):
            pool = TokenPooling(stages[i - 1][0], dims, pooling, pool_kernel) if i else None
            groups = groups if sharing else (1,) * depths[i]
            self.layers.append(
                SharingStage(
                    dims,
                    heads,
                    groups,
                    int(dims * mlp_ratio),
                    qkv_bias,
                    rates[i],
                    window_sizes[i],
                    pool,
                    with_cp,
                )  # fmt: skip
            )
        for i in self.out_indices:
            self.add_module(f'norm{i}', nn.LayerNorm(channels[i], NORM_EPS))
        self.finest = None
        if finest_map:
            if 0 not in self.out_indices or patch_size % 2:
                raise ValueError(
                    'finest_map is made of the map of stage 0 and has half its stride: it needs 0 '
                    'in out_indices and an even patch_size, '
                    f'got {self.out_indices} and {patch_size}'
                )
            self.finest = token_unpooling(channels[0])
            finest = dict(
                num_chs=channels[0], reduction=patch_size // 2, module='finest', index=None
            )
            self.feature_info = FeatureInfo(
                [finest, *self.feature_info.info], (0, *(i + 1 for i in self.out_indices))
            )
        self.train()

    @classmethod
    def resolve_arch(cls, arch: str | Mapping) -> dict:
        """Look an architecture up in the zoo, or check a user's own.

        Raises:
            ValueError, TypeError: As for :func:`~mmtoken.backbones.base.resolve_arch`; a stage that
                is not ``(embed_dims, num_heads, groups)``, heads that do not divide channels.
        """
        arch = cls.full_arch(arch)
        stages = [as_tuple(stage) for stage in as_tuple(arch['stages'])]
        if not stages:
            raise ValueError('arch has no stages')
        for i, stage in enumerate(stages):
            if len(stage) != 3 or isinstance(stage[2], int):
                raise ValueError(
                    f'stage {i} must be (embed_dims, num_heads, groups), with a tuple of groups, '
                    f'got {stage}'
                )
            dims, heads, groups = stage
            if not is_count(dims) or not is_count(heads):
                raise ValueError(
                    f'embed_dims and num_heads must be 1 or more, stage {i} has {dims!r}, {heads!r}'
                )
            if not groups or not all(map(is_count, groups)):
                raise ValueError(f'groups are of 1 or more layers, stage {i} has {groups}')
            check_heads(dims, heads, f'stage {i}: ')
        return dict(arch, stages=stages)

    def output_layers(self, index: int) -> list[nn.Module]:
        layers = [getattr(self, f'norm{index}')]
        return [*layers, self.finest] if index == 0 and self.finest is not None else layers

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute the maps.

        Args:
            x: Images, ``(B, in_channels, H, W)``, any H and W.

        Returns:
            One map ``(B, C_i, H_i, W_i)`` for each of ``out_indices``: H_0 is
            ``ceil(H / patch_size)``, H_i is ``ceil(H_{i-1} / 2)``. With ``finest_map`` first one of
            ``ceil(H / (patch_size / 2))`` rows, with the channels of stage 0.
        """
        compile_for_size(x)
        image_size = x.shape[-2:]
        tokens, layout = self.embed(x)
        tokens = tokens.unflatten(1, layout.grid)  # (B, H_0, W_0, C_0)
        maps = []
        for i, stage in enumerate(self.layers):
            tokens = stage(tokens)  # (B, H_i, W_i, C_i)
            name = (
                f'stage {i + 1}, {len(stage.groups)} attention maps in {len(stage.blocks)} layers'
            )
            record_rectangles(name, tokens.shape[0], layout.grid, lambda place, _, i=i: place >> i)
            if i in self.out_indices:
                maps.append(to_map(getattr(self, f'norm{i}')(tokens)))
        if self.finest is not None:
            size = tuple(ceil_div(side, self.patch_size // 2) for side in image_size)
            maps.insert(0, unpool_map(self.finest, maps[0], size))
        return join_maps(maps)


def check_windows(window_sizes: Sequence[int | None], num_stages: int) -> None:
    """Refuse impossible window sizes.

    Raises:
        ValueError: Sizes for another number of stages, or below 1.
    """
    sizes = tuple(window_sizes)
    if len(sizes) != num_stages or any(size is not None and size < 1 for size in sizes):
        raise ValueError(
            f'window_sizes are a side from 1, or None, for each of {num_stages} stages, got {sizes}'
        )
