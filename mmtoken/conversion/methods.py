"""Which sparse backbone takes the place of a dense one."""

import inspect
from collections.abc import Callable

from ..registry import MODELS
from .plain import Args, PlainConfig

# What a backbone may have and a method lacks, with what that means
LACKING = dict(
    layer_scale='layer scale is multiplied into the layers before it, which computes the same',
)
TARGETS = dict(query_ratio=0.5, coarse_ratio=0.5)  # those of the losses that the backbones have


def _stvit_r(args: Args) -> Args:
    windows = {}
    if args['window_size'] != 7:
        side = args['window_size']
        windows = dict(key_sizes=(2 * side, 3 * side, 27))  # as many windows as by default
    # The released mask of padding is for released weights.
    return dict(type='mmtoken.STViTRSwin', pad_mask='exact', **windows, **args)


def _stvit(args: Args) -> Args:
    return dict(type='mmtoken.STViTDeiT', base_layers=args['arch']['num_layers'] // 3, **args)


def _dge_deit(args: Args) -> Args:
    return dict(type='mmtoken.DGEDeiT', **args)


def _dge_pvt(args: Args) -> Args:
    return dict(type='mmtoken.DGEPVT', **args)


def _msvit(args: Args) -> Args:
    side = args['patch_size']
    others = {key: value for key, value in args.items() if key != 'patch_size'}
    return dict(type='mmtoken.MSViT', coarse_size=2 * side, fine_size=side, **others)


def _merge(args: Args) -> Args:
    depth = args['arch']['num_layers']
    blocks = tuple(sorted({depth // 6, 5 * depth // 12}))  # 2 and 5 of 12
    return dict(type='mmtoken.MergeViT', merge_blocks=blocks, **args)


# Method -> family of the dense backbone -> the sparse one
METHODS: dict[str, dict[str, Callable[[Args], Args]]] = {
    'stvit-r': dict(swin=_stvit_r),
    'stvit': dict(vit=_stvit),
    'dge': dict(vit=_dge_deit, pvt=_dge_pvt),
    'msvit': dict(vit=_msvit),
    'merge': dict(vit=_merge),
}
TRAINING_FREE = ('merge',)


def sparse_backbone(plain: PlainConfig, method: str) -> tuple[Args, list[str]]:
    """Config of the sparse backbone that takes the place of a dense one.

    Args:
        plain: From :func:`~mmtoken.conversion.plain.describe`.
        method: A key of :data:`METHODS`.

    Returns:
        A config with the channels and strides of the dense one, without what is the default, and
        notes on what changes.

    Raises:
        ValueError: The method is unknown or does not fit the backbone.
    """
    if method not in METHODS:
        raise ValueError(f'no method {method!r}; there are {", ".join(METHODS)}')
    if plain.family not in METHODS[method]:
        fitting = [name for name, families in METHODS.items() if plain.family in families]
        raise ValueError(f'{method} does not fit {plain.name}; {", ".join(fitting)} would')
    cfg = METHODS[method][plain.family](plain.args)
    cls = MODELS.get(cfg['type'])
    taken = {name: p.default for name, p in inspect.signature(cls).parameters.items()}
    notes = []
    for name in [name for name in cfg if name not in taken and name != 'type']:
        value = cfg.pop(name)
        if value and name not in LACKING:
            raise ValueError(f'{name}={value!r} of {plain.name} is nothing that {method} has')
        if value:
            notes.append(LACKING[name])
    cfg['arch'] = cls.short_arch(cfg['arch'])
    named = ('type', 'arch')
    return {name: v for name, v in cfg.items() if name in named or v != taken[name]}, notes
