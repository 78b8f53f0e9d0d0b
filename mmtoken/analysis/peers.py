"""The libraries' own backbones of the same widths, which a user would otherwise take."""

import inspect
from collections.abc import Mapping
from importlib.util import find_spec

from timm.layers import to_2tuple

from ..backbones.base import PlainBackbone
from ..backbones.dge_pvt import PATCH_SIZES
from .twin import our_class


def peer_config(backbone: dict) -> dict | None:
    """Config of the backbone that a library offers in place of one of ours.

    Args:
        backbone: Config of a backbone of ours.

    Returns:
        A config with the same widths, depths and output maps; None if there is no such backbone,
        its library is not installed, or it cannot have these widths or outputs.
    """
    cls = our_class(backbone)
    if cls.__name__ not in PEERS:
        return None
    libraries, name, translate = PEERS[cls.__name__]
    library = next((library for library in libraries if find_spec(library)), None)
    if library is None:
        return None
    arguments = {name: p.default for name, p in inspect.signature(cls).parameters.items()}
    arguments.update(backbone)
    if not isinstance(arguments['arch'], Mapping):
        arguments['arch'] = cls.arch_zoo[arguments['arch']]
    translated = translate(arguments)
    return None if translated is None else dict(type=f'{library}.{name}', **translated)


def _swin(arguments: dict) -> dict:
    same = ('in_channels', 'window_size', 'drop_path_rate', 'out_indices', 'with_cp')
    return dict(
        {name: arguments[name] for name in same},
        mlp_ratio=int(arguments['mlp_ratio']),  # theirs takes whole numbers only
        **arguments['arch'],
    )


def _vit(arguments: dict) -> dict:
    same = ('arch', 'img_size', 'patch_size', 'in_channels', 'qkv_bias', 'drop_path_rate')
    return dict(
        {name: arguments[name] for name in same},
        out_indices=list(arguments['out_indices']),
        out_type='featmap' if arguments['out_type'] == 'map' else arguments['out_type'],
        with_cls_token=bool(arguments.get('cls_token')),
    )


def _swat_deit(arguments: dict) -> dict:
    own = arguments['arch']
    arch = {name: own[name] for name in PlainBackbone.arch_keys}
    return _vit(dict(arguments, arch=arch, patch_size=own['patch_size']))


def _msvit(arguments: dict) -> dict | None:
    # A plain ViT: without registers, windows, or the layer scale of DINOv2.
    if arguments['num_registers'] or arguments['window_size'] or arguments['layer_scale']:
        return None
    out_type = arguments['out_type']
    return _vit(
        dict(
            arguments,
            patch_size=arguments['fine_size'],
            out_type='map' if out_type == 'tokens' else out_type,  # tokens become a map in a neck
        )
    )


def _pvt(arguments: dict) -> dict | None:
    arch = arguments['arch']
    dims, heads, stages = arch['embed_dims'], arch['num_heads'], len(arch['depths'])
    head_dims = {d // h for d, h in zip(dims, heads, strict=True)}
    # Theirs has heads of one width, and neither a class token nor an output but maps.
    if len(head_dims) > 1 or arguments['cls_token'] or arguments['out_type'] != 'map':
        return None
    same = ('in_channels', 'qkv_bias', 'drop_path_rate', 'out_indices')
    return dict(
        {name: arguments[name] for name in same},
        pretrain_img_size=to_2tuple(arguments['pretrain_img_size']),
        embed_dims=head_dims.pop(),
        num_stages=stages,
        num_layers=arch['depths'],
        patch_sizes=PATCH_SIZES[:stages],
        strides=PATCH_SIZES[:stages],
        paddings=(0,) * stages,
        **{name: arch[name] for name in ('num_heads', 'mlp_ratios', 'sr_ratios')},
    )


# Class of ours -> libraries that have the peer, its name there, and its arguments from ours.
PEERS = {
    'STViTRSwin': (('mmdet', 'mmseg'), 'SwinTransformer', _swin),
    'STViTDeiT': (('mmpretrain',), 'VisionTransformer', _vit),
    'DGEPVT': (('mmdet',), 'PyramidVisionTransformer', _pvt),
    'DGEDeiT': (('mmpretrain',), 'VisionTransformer', _vit),
    'MSViT': (('mmpretrain',), 'VisionTransformer', _msvit),
    'SWATSwin': (('mmdet', 'mmseg'), 'SwinTransformer', _swin),
    'SWATDeiT': (('mmpretrain',), 'VisionTransformer', _swat_deit),
}
