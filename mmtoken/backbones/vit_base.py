"""Base classes of the backbones on plain ViT.

Source: ViT, arXiv 2010.11929. Parameter names are timm's.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn as nn
from timm.layers import to_2tuple
from torch import Tensor

from ..layers.common.cache import compile_for_size
from ..layers.common.packed import SparseFeatures
from ..layers.common.positions import resample
from ..layers.common.rotary import Rotation, check_rotary, grid_rotation, rotated
from ..layers.common.stem import PatchEmbed
from ..layers.common.utils import (
    ceil_div,
    check_heads,
    drop_path_rates,
    join_maps,
    run_block,
    to_map,
    trunc_normal_parameter,
)
from ..layers.common.vit import MLPS, NORM_EPS, Attention, full_attention, mlp_layer
from .base import TokenBackbone, check_out_type

# What an architecture may say of its trunk, and what it is in ViT and DeiT: the MLP, the epsilon of
# norms, whether queries and keys are normalized, which rotary positions there are, whether there
# are learned ones, and registers
TRUNK_OPTIONS = dict(
    mlp='gelu', norm_eps=NORM_EPS, qk_norm=False, rotary=None, pos_embed=True, num_registers=0
)  # fmt: skip
DINOV3 = dict(rotary='dinov3', pos_embed=False, norm_eps=1e-5, num_registers=4)
# Trunks of later models, by the names of their weights
TRUNKS = {
    'dinov2-giant': dict(
        embed_dims=1536, num_layers=40, num_heads=24, feedforward_channels=4096, mlp='swiglu'
    ),
    'dinov3-small': dict(
        embed_dims=384, num_layers=12, num_heads=6, feedforward_channels=1536, **DINOV3
    ),
    'dinov3-small-plus': dict(
        embed_dims=384, num_layers=12, num_heads=6, feedforward_channels=1536, mlp='swiglu',
        **DINOV3,
    ),
    'dinov3-base': dict(
        embed_dims=768, num_layers=12, num_heads=12, feedforward_channels=3072, **DINOV3
    ),
    'dinov3-large': dict(
        embed_dims=1024, num_layers=24, num_heads=16, feedforward_channels=4096, **DINOV3
    ),
    'eva02-tiny': dict(
        embed_dims=192, num_layers=12, num_heads=3, feedforward_channels=512, mlp='swiglu',
        rotary='eva02',
    ),
    'eva02-small': dict(
        embed_dims=384, num_layers=12, num_heads=6, feedforward_channels=1024, mlp='swiglu',
        rotary='eva02',
    ),
    'eva02-base': dict(
        embed_dims=768, num_layers=12, num_heads=12, feedforward_channels=2048,
        mlp='swiglu-norm', rotary='eva02',
    ),
    'eva02-large': dict(
        embed_dims=1024, num_layers=24, num_heads=16, feedforward_channels=2730,
        mlp='swiglu-norm', rotary='eva02',
    ),
}  # fmt: skip


def block_options(arch: Mapping) -> dict:
    """How the blocks of an architecture differ from those of ViT: arguments of ``ViTBlock``."""
    options = {**TRUNK_OPTIONS, **arch}
    norm_layer = partial(nn.LayerNorm, eps=options['norm_eps'])
    return dict(
        norm_eps=options['norm_eps'],
        attn=partial(Attention, qk_norm=norm_layer if options['qk_norm'] else None),
        mlp=mlp_layer(options['mlp'], norm_layer),
    )


class DenseLayout(NamedTuple):
    """All tokens of the grid are there, row by row.

    Attributes:
        grid: ``(H, W)``, in tokens.
        rotation: Of queries and keys, where positions are rotary.
    """

    grid: tuple[int, int]
    rotation: Rotation | None = None


class PatchBackbone(TokenBackbone):
    """A backbone that starts as ViT does: patch embedding and position embedding."""

    stem_names = ('patch_embed', 'cls_token', 'reg_token', 'pos_embed')
    rotary: str | None = None

    def make_stem(
        self,
        embed_dims: int,
        img_size: int | tuple[int, int],
        patch_size: int,
        in_channels: int,
        cls_token: bool = False,
        num_registers: int = 0,
        pos_embed: bool = True,
    ) -> None:
        """Add the embeddings; for the arguments see :class:`PlainBackbone`."""
        self.embed_dims = embed_dims
        self.patch_size = patch_size
        self.patch_embed = PatchEmbed(embed_dims, in_channels, patch_size, norm=False)
        self.pos_grid = tuple(ceil_div(side, patch_size) for side in to_2tuple(img_size))
        self.num_prefix_tokens = int(cls_token) + num_registers
        self.cls_token = self.reg_token = None
        if cls_token:
            self.cls_token = trunc_normal_parameter(1, 1, embed_dims)
        if num_registers:
            self.reg_token = trunc_normal_parameter(1, num_registers, embed_dims)
        self.pos_embed = None
        if pos_embed:
            places = math.prod(self.pos_grid) + cls_token
            self.pos_embed = trunc_normal_parameter(1, places, embed_dims)

    def embed(self, x: Tensor) -> tuple[Tensor, DenseLayout]:
        """Embed the patches and add their positions.

        Args:
            x: Images, ``(B, in_channels, H, W)``; padded at the bottom and right to whole patches.

        Returns:
            Tokens ``(B, P + H' * W', C)``, prefix tokens first, then the grid row by row; and the
            layout of the grid.
        """
        x = self.patch_embed(x)  # (B, H', W', C)
        grid = (x.shape[1], x.shape[2])
        prefix, position = self.positions(grid)
        x = (x + position).flatten(1, 2)
        if self.num_prefix_tokens:
            x = torch.cat([prefix.expand(x.shape[0], -1, -1).to(x), x], dim=1)
        return x, DenseLayout(grid, self.rotation(grid, x.device))

    def positions(self, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Prefix tokens, and what is added to the tokens of a grid.

        Returns:
            ``(1, P, C)`` and ``(1, H, W, C)``; without learned positions zeros, ``(1, H, W, 1)``.
        """
        num_cls = int(self.cls_token is not None)
        if self.pos_embed is None:
            weight = self.patch_embed.proj.weight
            prefix = weight.new_empty(1, 0, self.embed_dims) if not num_cls else self.cls_token
            position = weight.new_zeros(1, *grid, 1)
        else:
            prefix, position = self.pos_embed[:, :num_cls], self.pos_embed[:, num_cls:]
            if num_cls:
                prefix = self.cls_token + prefix
            position = resample(position, self.pos_grid, grid, 'bicubic', True)
        if self.reg_token is not None:  # registers have no position
            prefix = torch.cat([prefix, self.reg_token], dim=1)
        return prefix, position

    def rotation(self, grid: tuple[int, int], device: torch.device) -> Rotation | None:
        """Of prefix tokens and a grid, row by row; None where positions are not rotary."""
        if self.rotary is None:
            return None
        head_dims = self.embed_dims // self.num_heads
        return grid_rotation(self.rotary, grid, self.num_prefix_tokens, head_dims, device)


class PlainBackbone(PatchBackbone):
    """A plain ViT, the trunk of every method on it: reduce, run the blocks, restore.

    A method overrides :meth:`reduce`, :meth:`run_block` and :meth:`restore`; as they are they give
    the dense ViT. A subclass sets ``blocks`` and calls :meth:`finish_init`. Each block counts as a
    stage in ``out_indices`` and ``frozen_stages``. Parameter names are timm's.

    Args:
        arch: ``'tiny'``, ``'small'``, ``'base'``, ``'large'``, or a dict with the keys
            ``embed_dims``, ``num_layers``, ``num_heads`` and ``feedforward_channels``. Some methods
            know later ones, too: see :data:`TRUNKS`.
        img_size: Image that the position embedding is laid out for, in pixels: a side, or
            ``(H, W)``. Images of any size are accepted.
        patch_size: Side of a patch, in pixels.
        in_channels: Channels of the image.
        cls_token: Whether there is a class token.
        num_registers: Register tokens, as in some weights of DINOv2. None for those of ``arch``.
        qkv_bias: Biases of queries, keys and values.
        layer_scale: Initial LayerScale; None for none. That of weights, such as DINOv2's, is folded
            into the layers before it where the model has none.
        drop_path_rate: Stochastic depth of the last block, rising linearly from 0.
        final_norm: Normalize the last block, as mmpretrain does by default and mmseg does not.
        out_indices: Blocks whose outputs are returned, in rising order; negative ones count from
            the end.
        out_type: ``'map'`` for dense maps. For classification ``'cls_token'``, the normalized class
            token of the last block, or ``'avg_featmap'``, the mean over its normalized map.
        out_prefix: Return the class token and registers too, ``(B, P, C)``, behind the last map,
            for the heads of :mod:`mmtoken.heads`.
        frozen_stages: Blocks kept fixed: 0 freezes the patch and position embedding, 1 the first
            block too, and so on; -1 freezes nothing.
        norm_eval: Accepted for compatibility; unused, since there is no BatchNorm.
        with_cp: Recompute the activations of each block in backward.
        init_cfg: MMEngine's initialization config.

    Raises:
        ValueError: Bad argument values; the message says what is allowed.
        TypeError: ``arch`` is neither a name nor a dict.
    """

    stages_name = 'blocks'
    out_types: ClassVar[tuple[str, ...]] = ('map', 'cls_token', 'avg_featmap')
    ignorable_keys = r'(head|head_dist|norm|fc_norm)\..*|cls_token|dist_token'
    arch_keys = ('embed_dims', 'num_layers', 'num_heads', 'feedforward_channels')
    arch_zoo: ClassVar[dict[str, dict]] = dict(
        tiny=dict(embed_dims=192, num_layers=12, num_heads=3, feedforward_channels=768),
        small=dict(embed_dims=384, num_layers=12, num_heads=6, feedforward_channels=1536),
        base=dict(embed_dims=768, num_layers=12, num_heads=12, feedforward_channels=3072),
        large=dict(embed_dims=1024, num_layers=24, num_heads=16, feedforward_channels=4096),
    )

    def __init__(
        self,
        arch: str | Mapping = 'small',
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_channels: int = 3,
        cls_token: bool = False,
        num_registers: int | None = None,
        qkv_bias: bool = True,
        layer_scale: float | None = None,
        drop_path_rate: float = 0.0,
        final_norm: bool = True,
        out_indices: Sequence[int] = (-1,),
        out_type: str = 'map',
        out_prefix: bool = False,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        arch = self.resolve_arch(arch)
        dims, depth = arch['embed_dims'], arch['num_layers']
        super().__init__(
            (dims,) * depth, (patch_size,) * depth, out_indices, frozen_stages, norm_eval, init_cfg
        )
        check_out_type(out_type, self.out_types, self.out_indices, depth - 1, cls_token)
        if num_registers is None:
            num_registers = arch.get('num_registers', 0)
        self.num_heads, self.rotary = arch['num_heads'], arch.get('rotary')
        options = block_options(arch)
        self.norm_layer = partial(nn.LayerNorm, eps=options['norm_eps'])
        self.qk_norm = options['attn'].keywords['qk_norm']
        self.mlp_layer = options['mlp']
        self.make_stem(
            dims, img_size, patch_size, in_channels, cls_token, num_registers,
            arch.get('pos_embed', True),
        )  # fmt: skip
        if out_prefix and out_type != 'map':
            raise ValueError(f"out_prefix needs out_type='map', got {out_type!r}")
        self.out_type = out_type
        self.out_prefix = out_prefix
        self.final_norm = final_norm
        self.with_cp = with_cp
        # For subclasses, which make the blocks
        self.drop_rates = drop_path_rates(drop_path_rate, [depth])[0][: self.num_built]
        self.block_args = dict(
            embed_dims=dims,
            num_heads=arch['num_heads'],
            feedforward_channels=arch['feedforward_channels'],
            qkv_bias=qkv_bias,
        )
        if layer_scale is not None:
            self.block_args.update(layer_scale=layer_scale)
        if self.arch_options:
            self.block_args.update(options)

    def finish_init(self) -> None:
        """Add the norm behind the last block, if an output needs it, and apply freezing."""
        # Only where it is used: DDP refuses parameters without a gradient.
        self.norm = self.norm_layer(self.embed_dims) if self.has_norm else nn.Identity()
        self.train()

    @property
    def has_norm(self) -> bool:
        """Whether the last block is normalized by this module."""
        return self.final_norm and self.num_stages - 1 in self.out_indices

    @property
    def unbuilt_keys(self) -> str | None:
        """As in other backbones, but blocks beyond those of the architecture are a mistake."""
        unbuilt = '|'.join(map(str, range(self.num_built, self.num_stages)))
        return rf'{self.stages_name}\.({unbuilt})\..*' if unbuilt else None

    @classmethod
    def resolve_arch(cls, arch: str | Mapping) -> dict:
        """Look an architecture up in the zoo, or check a user's own.

        Raises:
            ValueError, TypeError: As for :func:`~mmtoken.backbones.base.resolve_arch`; heads that
                do not divide channels; options with values that are not allowed.
        """
        arch = cls.full_arch(arch)
        check_heads(arch['embed_dims'], arch['num_heads'])
        if arch.get('mlp', MLPS[0]) not in MLPS:
            raise ValueError(f"arch['mlp'] must be one of {MLPS}, got {arch['mlp']!r}")
        check_rotary(arch.get('rotary'), arch['embed_dims'], arch['num_heads'], "arch['rotary']")
        return arch

    @classmethod
    def library_baseline(cls, args: Mapping) -> dict | None:
        """mmpretrain's ViT, which has neither registers nor layer scale nor later options."""
        later = any(args['arch'].get(key, value) != value for key, value in TRUNK_OPTIONS.items())
        if later or any(args.get(name) for name in ('num_registers', 'layer_scale', 'out_prefix')):
            return None
        same = ('img_size', 'patch_size', 'in_channels', 'qkv_bias', 'drop_path_rate')
        return dict(
            type=('mmpretrain.VisionTransformer',),
            arch={name: args['arch'][name] for name in PlainBackbone.arch_keys},
            out_indices=list(args['out_indices']),
            out_type='featmap' if args['out_type'] == 'map' else args['out_type'],
            with_cls_token=bool(args.get('cls_token')),
            final_norm=args['final_norm'],
            **{name: args[name] for name in same},
        )

    def output_layers(self, index: int) -> list[nn.Module]:
        return [self.norm] if index == self.num_stages - 1 else []

    def forward(self, x: Tensor) -> tuple[Tensor, ...] | tuple[SparseFeatures, ...]:
        """Compute the outputs.

        Args:
            x: Images, ``(B, in_channels, H, W)``, any H and W.

        Returns:
            One for each of ``out_indices``, according to ``out_type``: a map
            ``(B, C, ceil(H / patch_size), ceil(W / patch_size))``, a vector ``(B, C)``, or
            :class:`~mmtoken.layers.common.packed.SparseFeatures`.
        """
        compile_for_size(x)
        tokens, layout = self.reduce(x)
        outputs = []
        for i in range(self.num_built):
            tokens, layout = self.run_block(i, tokens, layout)
            if i in self.out_indices:
                outputs += self.output(i, tokens, layout)
        self.finish(layout)
        return join_maps(outputs)

    def reduce(self, x: Tensor) -> tuple[Tensor, Any]:
        """Images ``(B, in_channels, H, W)`` to tokens, and where on the grid they belong."""
        return self.embed(x)

    def run_block(self, index: int, tokens: Tensor, layout: Any) -> tuple[Tensor, Any]:
        """Run one block; it may change the layout."""
        attn_fn = rotated(full_attention, None if self.rotary is None else layout.rotation)
        return self.checkpoint(self.blocks[index], tokens, attn_fn), layout

    def restore(self, index: int, tokens: Tensor, layout: Any) -> Tensor:
        """Tokens behind a block to those of the whole grid, prefix first: ``(B, P + H * W, C)``."""
        return tokens

    def to_features(self, index: int, tokens: Tensor, layout: Any) -> SparseFeatures:
        """Tokens behind a block for a neck that restores them, with ``out_type='tokens'``."""
        raise NotImplementedError

    def finish(self, layout: Any) -> None:
        """Called with the last layout, behind all blocks."""

    def output(self, index: int, tokens: Tensor, layout: Any) -> list[Tensor | SparseFeatures]:
        """The output behind one block; with ``out_prefix`` two behind the last."""
        if index == self.num_stages - 1:
            tokens = self.norm(tokens)
        if self.out_type == 'tokens':
            return [self.to_features(index, tokens, layout)]
        dense = self.restore(index, tokens, layout)  # (B, P + H * W, C)
        if self.out_type == 'cls_token':
            return [dense[:, 0]]
        prefix, dense = dense.tensor_split([self.num_prefix_tokens], dim=1)
        if self.out_type == 'avg_featmap':
            return [dense.mean(dim=1)]
        dense = to_map(dense.unflatten(1, layout.grid))
        return [dense, prefix] if self.out_prefix and index == self.out_indices[-1] else [dense]

    def checkpoint(self, function: Callable, *args) -> Any:
        """Call a block; with ``with_cp`` its activations are recomputed in backward."""
        return run_block(function, *args, recompute=self.with_cp)
