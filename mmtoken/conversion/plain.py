"""Dense backbones, of OpenMMLab's libraries and ours, by the arguments of our backbones."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mmengine.registry import MODELS, init_default_scope

from ..analysis.twin import our_class
from ..backbones.dge_deit import DGEDeiT
from ..backbones.dge_pvt import DGEPVT, PATCH_SIZES
from ..backbones.merge_vit import MergeViT
from ..backbones.msvit import MSViT
from ..backbones.stvit_deit import STViTDeiT
from ..backbones.stvit_r_swin import STViTRSwin
from ..backbones.swin_base import SwinBackbone
from ..backbones.vit_base import PlainBackbone
from ..layers.common.vit import NORM_EPS

Args = dict[str, Any]

# Of a dense backbone of ours, what all methods on its family have
SHARED = dict(
    vit=tuple(inspect.signature(PlainBackbone).parameters),
    swin=('arch', 'form', 'stem', 'in_channels', 'window_size', 'mlp_ratio', 'drop_path_rate',
          'out_indices', 'frozen_stages', 'norm_eval', 'with_cp'),
    pvt=('arch', 'cls_token', 'pretrain_img_size', 'in_channels', 'qkv_bias', 'drop_path_rate',
         'out_indices', 'out_type', 'frozen_stages', 'norm_eval', 'with_cp'),
)  # fmt: skip
OURS = {
    **dict.fromkeys((DGEDeiT, MergeViT, MSViT, STViTDeiT), 'vit'),
    STViTRSwin: 'swin',
    DGEPVT: 'pvt',
}
WEIGHTS = ('init_cfg', 'pretrained', 'convert_weights')
DROPOUT = ('drop_rate', 'attn_drop_rate')


@dataclass(frozen=True)
class PlainConfig:
    """A dense backbone.

    Attributes:
        name: As in messages, such as ``'mmdet.SwinTransformer'``.
        family: ``'swin'``, ``'vit'`` or ``'pvt'``.
        args: Arguments that our backbones of the family share, with their values here.
        notes: What differs from ours, and does no harm.
    """

    name: str
    family: str
    args: Args
    notes: list[str] = field(default_factory=list)


def describe(backbone: Mapping, scope: str) -> PlainConfig:
    """Read the config of a dense backbone.

    Args:
        backbone: Its config.
        scope: Library whose registry knows its type.

    Raises:
        ValueError: It is none of those known, or an argument has no counterpart in ours, or it is
            sparse already.
    """
    cls = our_class(backbone)
    if cls is not None:
        return _describe_ours(cls, backbone)
    init_default_scope(scope)
    given = backbone.get('type')
    with MODELS.switch_scope_and_registry(scope) as registry:
        cls = registry.get(given) if isinstance(given, str) else given
    name = f'{cls.__module__.partition(".")[0]}.{cls.__name__}' if cls else str(given)
    if name not in STOCK:
        remark = f'; {REMARKS[name]}' if name in REMARKS else ''
        known = ', '.join((*STOCK, *(f'mmtoken.{c.__name__}' for c in OURS)))
        raise ValueError(f'no method fits the backbone {name}{remark}; known are {known}')
    defaults = _defaults(cls)
    args = defaults | {key: _plain(value) for key, value in backbone.items() if key != 'type'}
    family, norm_eps, take = STOCK[name]
    ours = take(args, cls)  # removes what it reads
    notes = _check_rest(name, args, defaults, norm_eps)
    if family == 'pvt':
        notes.append('norms before blocks and of reduced keys have eps=1e-05, there 1e-06')
    return PlainConfig(name, family, ours, notes)


def _describe_ours(cls: type, backbone: Mapping) -> PlainConfig:
    name = f'mmtoken.{cls.__name__}'
    if cls not in OURS:
        known = ', '.join(f'mmtoken.{c.__name__}' for c in OURS)
        raise ValueError(f'no other method fits the backbone {name}; those of ours are {known}')
    args = _defaults(cls) | {key: _plain(value) for key, value in backbone.items()}
    sparse = {key: args[key] for key, value in cls.twin_args.items() if args[key] != value}
    # A budget does nothing where there is one granularity.
    if sparse.keys() - {'budget'}:
        raise ValueError(
            f'{name} computes on fewer tokens already, with {sparse}; give the config of a dense '
            f'network, such as its twin, with {cls.twin_args}'
        )
    if cls is MSViT:
        if args['window_size'] is not None:
            raise ValueError(f'{name} has windows of attention, which other methods do not have')
        args['patch_size'] = args['fine_size']
    family = OURS[cls]
    shared = {key: args[key] for key in SHARED[family] if key in args and key != 'init_cfg'}
    arch = cls.short_arch(args['arch'])
    arch = dict(cls.arch_zoo[arch]) if isinstance(arch, str) else arch
    return PlainConfig(name, family, shared | dict(arch=arch))


def _take_swin(args: Args, cls: type) -> Args:
    """mmdet's and mmseg's, for maps."""
    same = ('in_channels', 'window_size', 'mlp_ratio', 'drop_path_rate', 'out_indices',
            'frozen_stages', 'with_cp')  # fmt: skip
    del args['pretrain_img_size']  # of absolute positions, which are refused
    arch = {key: args.pop(key) for key in SwinBackbone.arch_keys}
    return dict(arch=arch, stem='patch', **{key: args.pop(key) for key in same})


def _take_classifying_swin(args: Args, cls: type) -> Args:
    """mmpretrain's, which shifts no windows of a grid that is as small as one."""
    same = ('in_channels', 'window_size', 'drop_path_rate', 'out_indices', 'norm_eval', 'with_cp')
    del args['img_size']
    frozen = args.pop('frozen_stages')
    return dict(
        arch=_arch_of(args, cls, SwinBackbone.arch_keys),
        form='dense' if args.pop('pad_small_map') else 'classification',
        stem='patch',
        frozen_stages=frozen + 1 if frozen >= 0 else -1,  # 0 is the stem and the first stage there
        **{key: args.pop(key) for key in same},
    )


def _take_pvt(args: Args, cls: type) -> Args:
    same = ('in_channels', 'qkv_bias', 'drop_path_rate', 'out_indices', 'pretrain_img_size')
    stages, width = args.pop('num_stages'), args.pop('embed_dims')
    for name in ('patch_sizes', 'strides'):
        if tuple(args[name]) == PATCH_SIZES[:stages]:
            del args[name]
    if not any(args['paddings']):
        del args['paddings']
    heads = args.pop('num_heads')
    arch = dict(
        embed_dims=tuple(width * number for number in heads),
        depths=args.pop('num_layers'),
        num_heads=heads,
        mlp_ratios=args.pop('mlp_ratios'),
        sr_ratios=args.pop('sr_ratios'),
    )
    return dict(arch=arch, **{key: args.pop(key) for key in same})


def _take_segmenting_vit(args: Args, cls: type) -> Args:
    """mmseg's."""
    same = ('img_size', 'patch_size', 'in_channels', 'out_indices', 'qkv_bias', 'drop_path_rate',
            'final_norm', 'norm_eval', 'with_cp')  # fmt: skip
    del args['patch_bias']  # a bias of zero is added
    arch = {key: args.pop(key) for key in ('embed_dims', 'num_layers', 'num_heads')}
    arch['feedforward_channels'] = int(args.pop('mlp_ratio') * arch['embed_dims'])
    return dict(
        arch=arch,
        cls_token=args.pop('with_cls_token'),
        **{key: args.pop(key) for key in same},
    )


def _take_classifying_vit(args: Args, cls: type) -> Args:
    """mmpretrain's: ViT, DeiT, MAE and DINOv2."""
    same = ('img_size', 'patch_size', 'in_channels', 'out_indices', 'qkv_bias', 'drop_path_rate',
            'final_norm')  # fmt: skip
    out_type, frozen = args.pop('out_type'), args.pop('frozen_stages')
    out_types = dict(featmap='map', cls_token='cls_token')
    if out_type not in out_types:
        raise ValueError(
            f'out_type={out_type!r} of mmpretrain.{cls.__name__} has no counterpart; '
            f'{", ".join(map(repr, out_types))} have'
        )
    return dict(
        arch=_arch_of(args, cls, PlainBackbone.arch_keys),
        cls_token=args.pop('with_cls_token'),
        out_type=out_types[out_type],
        layer_scale=args.pop('layer_scale_init_value') or None,
        frozen_stages=frozen if frozen > 0 else -1,  # 0 freezes nothing there
        **{key: args.pop(key) for key in same},
    )


def _arch_of(args: Args, cls: type, keys: tuple[str, ...]) -> Args:
    """The architecture of a backbone of mmpretrain, by its name there or a dict."""
    arch = args.pop('arch')
    if isinstance(arch, str):
        if arch.lower() not in cls.arch_zoo:
            raise ValueError(f'arch={arch!r} is unknown; known are {sorted(cls.arch_zoo)}')
        arch = cls.arch_zoo[arch.lower()]
    return {key: _plain(arch[key]) for key in keys}


# Name -> family, epsilon of its norms in ours, and what reads its arguments
STOCK: dict[str, tuple[str, float, Callable[[Args, type], Args]]] = {
    'mmdet.SwinTransformer': ('swin', 1e-5, _take_swin),
    'mmseg.SwinTransformer': ('swin', 1e-5, _take_swin),
    'mmpretrain.SwinTransformer': ('swin', 1e-5, _take_classifying_swin),
    'mmdet.PyramidVisionTransformer': ('pvt', 1e-6, _take_pvt),
    'mmseg.VisionTransformer': ('vit', NORM_EPS, _take_segmenting_vit),
    'mmpretrain.VisionTransformer': ('vit', NORM_EPS, _take_classifying_vit),
}
REMARKS = {
    'mmseg.MAE': 'its attention has biases of relative positions, which no plain ViT has; '
    'the weights of MAE fit mmpretrain.VisionTransformer',
    'mmseg.BEiT': 'its attention has biases of relative positions, which no plain ViT has',
    'mmdet.PyramidVisionTransformerV2': 'it has convolutions in its MLPs, which DGE on PVT has not',
    'mmpretrain.DistilledVisionTransformer': 'it has a distillation token, which no method has',
}


def _check_rest(name: str, args: Args, defaults: Args, norm_eps: float) -> list[str]:
    """Notes on arguments that were not read.

    Raises:
        ValueError: One without a counterpart has another value than the default, which has.
    """
    notes = []
    norm = args.pop('norm_cfg', None) or dict(type='LN')
    if norm.get('type') != 'LN':
        raise ValueError(f"norm_cfg={norm} of {name} has no counterpart, only type='LN' has")
    eps = norm.get('eps', 1e-5)
    if eps != norm_eps:
        notes.append(f'norms have eps={norm_eps:g}, there {eps:g}')
    for key in DROPOUT:
        if args.pop(key, 0):
            notes.append(f'{key} is left out: there is stochastic depth alone')
    for key, value in args.items():
        if key not in WEIGHTS and value != defaults.get(key):
            only = f'only {defaults[key]!r} has' if key in defaults else 'it takes no such argument'
            raise ValueError(f'{key}={value!r} of {name} has no counterpart; {only}')
    return notes


def _defaults(cls: type) -> Args:
    parameters = inspect.signature(cls).parameters.values()
    return {p.name: _plain(p.default) for p in parameters if p.default is not p.empty}


def _plain(value: Any) -> Any:
    """The same with tuples for lists, and dicts for ``ConfigDict``; so that values compare."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return tuple(map(_plain, value)) if isinstance(value, (list, tuple)) else value
