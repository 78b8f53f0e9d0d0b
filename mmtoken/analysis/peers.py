"""The libraries' own backbones of the same widths, which a user would otherwise take."""

import inspect
from collections.abc import Mapping
from importlib.util import find_spec

from .twin import our_class


def peer_config(backbone: dict) -> dict | None:
    """Config of the backbone that a library offers in place of one of ours.

    Args:
        backbone: Config of a backbone of ours.

    Returns:
        A config with the same widths, depths and output maps; None if there is no such backbone or
        its library is not installed.
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
    return dict(type=f'{library}.{name}', **translate(arguments))


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
        with_cls_token=False,
    )


# Class of ours -> libraries that have the peer, its name there, and its arguments from ours.
PEERS = {
    'STViTRSwin': (('mmdet', 'mmseg'), 'SwinTransformer', _swin),
    'STViTDeiT': (('mmpretrain',), 'VisionTransformer', _vit),
}
