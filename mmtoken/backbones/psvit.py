"""PSViT: a pyramid of pooled tokens, and layers that share attention maps.

Source: PSViT, arXiv 2108.03428. No code was released; what was not established from the paper is
decided here, see :class:`PSViT`.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar, get_args

import torch
import torch.nn as nn
from torch import Tensor

from ..arguments import as_tuple
from ..layers.common.old_tiles import chunked_apply
from ..layers.common.utils import join_maps, to_map
from ..layers.common.vit import NORM_EPS
from ..layers.psvit.pooling import Pooling, TokenPooling
from ..layers.psvit.shared_attention import Sharing
from ..layers.psvit.stage import SharingStage
from ..registry import MODELS
from .base import PatchBackbone, resolve_arch


@MODELS.register_module()
class PSViT(PatchBackbone):
    """ViT whose tokens are pooled between stages, and whose layers share attention maps in groups.

    The first layer of a group computes the map; the others have values, an output projection and an
    MLP. Maps have strides 8, 16 and 32 and are normalised.

    Established by the paper: tokens are pooled over depth, twice; layers that follow each other use
    one attention map; how is searched for, with networks of about the cost of DeiT. Ours, where no
    text of it was at hand: the operator that pools and the channels it leads to; groups, widths
    and depths of the zoo; that queries, keys and the softmax of a sharing layer are left out and
    all else stays; pre-norm; the patch size, windows, output norms and the stride-4 map, which
    dense prediction wants.

    Padding: the padding of a batch is image like any other. Positions are resampled to the padded
    grid, and the third stage sees all of it: an image has other maps, everywhere, than alone.

    Args:
        arch: ``'tiny'``, ``'small'``, or a dict with the key ``stages``: for each stage
            ``(embed_dims, num_heads, groups)``, where groups are the numbers of layers that share a
            map: ``(2, 2, 1)`` are five layers, of which three compute one.
        pooling: What leads from one stage to the next, behind or in a convolution that changes
            channels: ``'max'`` or ``'mean'`` of 3 x 3 tokens, or ``'conv'``, a stride.
        pool_kernel: Of that convolution, 3 or 1.
        sharing: ``'map'`` keeps the map of a group. ``'query_key'`` keeps what it is made of, for
            fused attention in every layer: more arithmetic, less memory. ``'auto'`` does what is
            faster. ``None`` gives the dense twin: every layer has a map of its own.
        max_map_tokens: ``'map'`` refuses windows, or grids, of more tokens; see :meth:`map_bytes`.
        window_sizes: For each stage, or one for all, the side of the windows that bound attention,
            in tokens, or None for none. At the border of the grid windows are smaller. By default
            the second stage is one window in images of up to 512 pixels, and the third always is.
        img_size: Image that the position embedding is laid out for, in pixels: a side, or
            ``(H, W)``. Images of any size are accepted.
        patch_size: Side of a patch, in pixels; it is the first stage's stride.
        in_channels: Channels of the image.
        qkv_bias: Biases for queries, keys and values.
        mlp_ratio: Hidden width of the MLPs over the channels.
        drop_path_rate: Stochastic depth of the last layer, rising linearly from 0.
        out_indices: Stages whose maps are returned, in rising order.
        finest_map: Return a map of half the first stride too, before the others, made of the first
            stage's by a transposed convolution: detectors want strides from 4.
        frozen_stages: Stages kept fixed: 0 freezes the patch and position embedding, 1 the first
            stage too, and so on; -1 freezes nothing.
        norm_eval: Of no effect here, since there is no batch norm.
        with_cp: Recompute the activations of each group in backward.
        init_cfg: MMEngine's initialisation config.

    Raises:
        ValueError: Bad argument values; the message says what is allowed.
        TypeError: ``arch`` is neither a name nor a dict.
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
        sharing: Sharing | None = 'auto',
        max_map_tokens: int = 4096,
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
        check_sharing(sharing, max_map_tokens)
        window_sizes = as_tuple(window_sizes)
        if len(window_sizes) == 1:
            window_sizes *= len(stages)
        check_windows(window_sizes, len(stages))
        super().__init__(len(stages), out_indices, frozen_stages, norm_eval, init_cfg)
        self.make_stem(stages[0][0], img_size, patch_size, in_channels)
        depths = [sum(groups) for _, _, groups in stages]
        rates = torch.linspace(0, drop_path_rate, sum(depths), device='cpu').split(depths)
        self.layers = nn.ModuleList()
        for i, (dims, heads, groups) in enumerate(stages[: self.num_built]):
            before = TokenPooling(stages[i - 1][0], dims, pooling, pool_kernel) if i else None
            self.layers.append(
                SharingStage(
                    dims,
                    heads,
                    groups if sharing else (1,) * depths[i],
                    int(dims * mlp_ratio),
                    qkv_bias,
                    rates[i].tolist(),
                    window_sizes[i],
                    sharing or 'auto',
                    max_map_tokens,
                    before,
                    with_cp,
                )
            )
        self.out_channels = tuple(stages[i][0] for i in self.out_indices)
        for i in self.out_indices:
            self.add_module(f'norm{i}', nn.LayerNorm(stages[i][0], NORM_EPS))
        self.finest = None
        if finest_map:
            if 0 not in self.out_indices or patch_size % 2:
                raise ValueError(
                    'finest_map is made of the map of stage 0 and has half its stride: it needs 0 '
                    'in out_indices and an even patch_size, '
                    f'got {self.out_indices} and {patch_size}'
                )
            self.finest = nn.ConvTranspose2d(stages[0][0], stages[0][0], 2, 2)
            self.out_channels = (stages[0][0], *self.out_channels)
        self.train()

    @classmethod
    def resolve_arch(cls, arch: str | Mapping) -> dict:
        """Look an architecture up in the zoo, or check a user's own.

        Raises:
            ValueError, TypeError: As for :func:`~mmtoken.backbones.base.resolve_arch`; a stage that
                is not ``(embed_dims, num_heads, groups)``, heads that do not divide channels.
        """
        arch = resolve_arch(arch, cls.arch_zoo, cls.arch_keys)
        stages = [tuple(stage) for stage in arch['stages']]
        if not stages:
            raise ValueError('arch has no stages')
        for i, stage in enumerate(stages):
            if len(stage) != 3 or isinstance(stage[2], int):
                raise ValueError(
                    f'stage {i} must be (embed_dims, num_heads, groups), with a tuple of groups, '
                    f'got {stage}'
                )
            dims, heads, groups = stage
            if not groups or any(size < 1 for size in groups):
                raise ValueError(f'groups are of 1 or more layers, stage {i} has {groups}')
            if dims % heads:
                raise ValueError(f'stage {i} has {dims} channels, no multiple of its {heads} heads')
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

        Raises:
            ValueError: ``sharing='map'`` and an image with too many tokens.
        """
        height, width = x.shape[-2:]
        tokens, layout = self.embed(x)
        tokens = tokens.unflatten(1, layout.grid)
        maps = []
        for i, stage in enumerate(self.layers):
            tokens = stage(tokens)
            if i in self.out_indices:
                norm = getattr(self, f'norm{i}')
                normed = chunked_apply(norm, tokens, training=self.training, layers=(norm,))
                maps.append(to_map(normed))
        if self.finest is not None:
            stride = self.patch_size // 2
            finest = self.finest(maps[0])[:, :, : -(-height // stride), : -(-width // stride)]
            maps.insert(0, finest.contiguous())
        return join_maps(maps)

    def set_layout(self, layout: Sequence[Sequence[int]] | None) -> None:
        """Run the first layers of each stage in other groups, until told otherwise.

        A network built with ``sharing=None``, whose layers all have queries and keys, can so be
        tried in any layout with the weights it has.

        Args:
            layout: Groups of each stage, as in ``arch``; None for those of the network.

        Raises:
            ValueError: Groups for another number of stages, or that a stage does not have the
                layers for; all groups are then as they were.
        """
        layout = (None,) * len(self.layers) if layout is None else tuple(layout)
        if len(layout) != len(self.layers):
            raise ValueError(f'groups of {len(self.layers)} stages are needed, got {layout}')
        before = [stage.groups for stage in self.layers]
        try:
            for stage, groups in zip(self.layers, layout, strict=True):
                stage.set_groups(groups)
        except ValueError:
            for stage, groups in zip(self.layers, before, strict=True):
                stage.set_groups(groups)
            raise

    def map_bytes(
        self,
        height: int,
        width: int,
        batch_size: int = 1,
        dtype: torch.dtype = torch.float32,
        training: bool = False,
    ) -> tuple[int, ...]:
        """Bytes of the attention map that a group keeps on a CPU, for each stage; 0 for none.

        In training each group keeps its own for backward. Inference has one at a time, and of a few
        windows only; its memory is kept for the next one, unless it is large
        (:func:`~mmtoken.layers.psvit.shared_attention.kept_memory`). With ``sharing='auto'`` a GPU keeps
        none.

        Args:
            height, width: Of the images, in pixels.
            batch_size: Images.
            dtype: Of the map.
            training: In training, not in inference.
        """
        grid, sizes = tuple(-(-side // self.patch_size) for side in (height, width)), []
        for stage in self.layers:
            sizes.append(stage.map_bytes(grid, batch_size, dtype, training))
            grid = tuple(-(-side // 2) for side in grid)
        return tuple(sizes)


def check_sharing(sharing: Sharing | None, max_map_tokens: int) -> None:
    """Refuse what is not known.

    Raises:
        ValueError: An unknown way to share, or no tokens.
    """
    if sharing not in (*get_args(Sharing), None):
        raise ValueError(f'sharing must be one of {get_args(Sharing)} or None, got {sharing!r}')
    if max_map_tokens < 1:
        raise ValueError(f'max_map_tokens must be 1 or more, got {max_map_tokens}')


def check_windows(window_sizes: Sequence[int | None], num_stages: int) -> None:
    """Refuse windows that there cannot be.

    Raises:
        ValueError: Sizes for another number of stages, or below 1.
    """
    sizes = tuple(window_sizes)
    if len(sizes) != num_stages or any(size is not None and size < 1 for size in sizes):
        raise ValueError(
            f'window_sizes are a side from 1, or None, for each of {num_stages} stages, got {sizes}'
        )
