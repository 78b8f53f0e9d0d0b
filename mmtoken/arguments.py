"""Argument checks for users who come from OpenMMLab's own backbones.

Arguments that mean the same are accepted; others are refused when the module is built, with a
message that says how to fix it.
"""

import inspect
import logging
import math
import os
from abc import ABCMeta
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

from mmengine.logging import print_log
from mmengine.model import PretrainedInit

from .checkpoints.download import ZOOS

# Arguments of other backbones, and how to fix them
REMEDIES = {
    **dict.fromkeys(
        ('embed_dims', 'depth', 'depths', 'num_layers', 'num_heads', 'num_stages', 'mlp_ratios',
         'sr_ratios', 'feedforward_channels'),
        'it belongs into arch, a name or a dict, such as arch=dict(..., {name}=...)',
    ),
    **dict.fromkeys(
        ('norm_cfg', 'act_cfg', 'patch_norm', 'pre_norm', 'final_norm', 'interpolate_mode'),
        'the method decides that; leave it out',
    ),
    'convert_weights': 'foreign names are recognised and converted; leave it out',
    'pretrain_img_size': 'it is img_size here',
    'img_size': 'any image size is accepted; leave it out',
    'with_cls_token': 'it is cls_token, if the backbone can have one',
    'use_abs_pos_embed': 'the method decides that; leave it out',
    'drop_rate': 'there is drop_path_rate, stochastic depth, alone',
    'attn_drop_rate': 'there is drop_path_rate, stochastic depth, alone',
    'mlp_ratio': 'it belongs into arch, as feedforward_channels or mlp_ratios',
    'strides': 'strides are those of the method',
    'use_checkpoint': 'it is with_cp',
    'in_chans': 'it is in_channels',
    'num_classes': 'there is no classifier; leave it out',
}  # fmt: skip
TRANSFORMERS = ('swin', 'vit', 'deit', 'pvt', 'mae', 'dino', 'beit')


def is_count(value: Any) -> bool:
    """Whether a value is a whole number of 1 or more."""
    return isinstance(value, Integral) and not isinstance(value, bool) and value >= 1


def is_number(value: Any) -> bool:
    """Whether a value is a number, and neither infinite nor NaN."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _is_size(value: Any) -> bool:
    sides = as_tuple(value)
    return not isinstance(value, str) and len(sides) in (1, 2) and all(map(is_count, sides))


# Arguments that mean the same wherever they occur: whether a value is allowed, and which are. What
# is None by default may be None.
COUNT = (is_count, 'a whole number of 1 or more')
COUNT_OR_NONE = (lambda value: value is None or is_count(value), f'{COUNT[1]}, or None')
SIZE = (_is_size, 'a side of 1 or more pixels, or (H, W)')
CONFIG = (lambda value: value is None or isinstance(value, Mapping), 'a dict or None')
ALLOWED: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(
        ('patch_size', 'coarse_size', 'fine_size', 'region_size', 'num_points', 'window_size',
         'out_channels', 'num_outs'),
        COUNT,
    ),
    'semantic_size': COUNT_OR_NONE,
    'in_channels': (
        lambda value: not isinstance(value, str) and all(map(is_count, as_tuple(value))),
        'channels, of 1 or more',
    ),
    **dict.fromkeys(('img_size', 'pretrain_img_size'), SIZE),
    'num_registers': (
        lambda value: isinstance(value, Integral) and value >= 0, 'a whole number of 0 or more',
    ),
    'drop_path_rate': (
        lambda value: is_number(value) and 0 <= value < 1, 'a number from 0 to below 1'
    ),
    'mlp_ratio': (lambda value: is_number(value) and value > 0, 'a number above 0'),
    **dict.fromkeys(('budget', 'router', 'gate'), CONFIG),
}  # fmt: skip


class KnownArguments(ABCMeta):
    """Refuses unknown arguments of a class with a list of those that it takes."""

    def __call__(cls, *args, **kwargs):
        """Build an instance.

        Raises:
            TypeError: An unknown argument.
        """
        known = _parameters(cls)
        for name in kwargs:
            if name not in known:
                remedy = f'it takes {", ".join(known) or "no arguments"}'
                raise TypeError(f'{cls.__name__} takes no {name}: {remedy}')
        return super().__call__(*args, **kwargs)


class CheckedArguments(KnownArguments):
    """Checks the arguments of a class when it is called, before its constructor sees them."""

    def __call__(cls, *args, **kwargs):
        """Build an instance.

        Raises:
            TypeError: An unknown argument, or an ``init_cfg`` that MMEngine does not take.
            ValueError: A value that is not allowed, ``pretrained`` that is for another backbone,
                ``init_cfg`` without ``type`` or without ``checkpoint``.
        """
        from .fast import optimize_for_cpu  # which imports all layers

        known = _parameters(cls)
        pretrained = None if 'pretrained' in known else kwargs.pop('pretrained', None)
        for name in kwargs:
            if name not in known and name in REMEDIES:
                remedy = REMEDIES[name].format(name=name)
                raise TypeError(f'{cls.__name__} takes no {name}: {remedy}')
        _check_values(dict(zip(known, args, strict=False)) | kwargs, known)
        if pretrained is not None:
            kwargs['init_cfg'] = _init_cfg_of(pretrained, kwargs.get('init_cfg'), cls.__name__)
        check_init_cfg(kwargs.get('init_cfg'), cls.__name__)
        module = super().__call__(*args, **kwargs)
        module.after_construction()
        return optimize_for_cpu(module)

    @property
    def __signature__(cls) -> inspect.Signature:
        """That of the constructors; ``inspect`` would show the one of :meth:`__call__`."""
        return inspect.Signature(sorted(_parameters(cls).values(), key=lambda p: p.kind))


def _check_values(given: Mapping[str, Any], known: Mapping[str, inspect.Parameter]) -> None:
    """Raise a ValueError for a value that :data:`ALLOWED` does not allow."""
    for name, value in given.items():
        if name not in known or name not in ALLOWED:
            continue
        if value is None and known[name].default is None:
            continue
        is_allowed, allowed = ALLOWED[name]
        if not is_allowed(value):
            raise ValueError(f'{name} must be {allowed}, got {value!r}')


def as_tuple(values: Any) -> tuple:
    """A sequence as a tuple, and one number, or None, as a tuple of one."""
    return tuple(values) if hasattr(values, '__iter__') else (values,)


def is_pretrained(init_cfg: Mapping) -> bool:
    """Whether an entry of ``init_cfg`` names a checkpoint: by the name of the type or the class."""
    kind = init_cfg['type']
    return kind is PretrainedInit or str(kind).rpartition('.')[2] == 'Pretrained'


def entries_of(init_cfg: Mapping | Sequence[Mapping] | None) -> list[Mapping]:
    """The entries of ``init_cfg`` in any of the forms that MMEngine takes."""
    if not init_cfg:
        return []
    return [init_cfg] if isinstance(init_cfg, Mapping) else list(init_cfg)


def check_init_cfg(init_cfg: Any, owner: str) -> None:
    """Refuse an ``init_cfg`` on which MMEngine would fail after the model is built.

    Args:
        init_cfg: As given to a module.
        owner: Name of its class, for messages.

    Raises:
        TypeError: Neither None nor a dict nor a list of dicts.
        ValueError: An entry without ``type``, or of type ``'Pretrained'`` without ``checkpoint``.
    """
    example = "init_cfg=dict(type='Pretrained', checkpoint='weights.pth')"
    if not isinstance(init_cfg, (Mapping, list, tuple, type(None))):
        raise TypeError(f'init_cfg of {owner} is a dict or a list of dicts, got {init_cfg!r}; '
                        f'write {example}')  # fmt: skip
    for entry in entries_of(init_cfg):
        if not isinstance(entry, Mapping):
            raise TypeError(f'init_cfg of {owner} has the entry {entry!r}, which is no dict')
        if 'type' not in entry:
            raise ValueError(f'init_cfg of {owner} has no type, got {dict(entry)}; write {example}')
        if is_pretrained(entry):
            file = entry.get('checkpoint')
            if not isinstance(file, (str, os.PathLike)) or not os.fspath(file):
                raise ValueError(
                    f'init_cfg of {owner} names no checkpoint, got {dict(entry)}; write {example}'
                )


def _parameters(cls: type) -> dict[str, inspect.Parameter]:
    """What a constructor takes, with the keywords that it hands on to those of its bases."""
    taken: dict[str, inspect.Parameter] = {}
    bases = [base for base in cls.__mro__[:-1] if '__init__' in vars(base)]  # without object
    if not bases:
        return taken
    first = bases[0]
    for base in bases:
        parameters = list(inspect.signature(base.__init__).parameters.values())[1:]
        for parameter in parameters:
            if parameter.kind is parameter.VAR_KEYWORD:
                continue
            if taken and base is not first:
                parameter = parameter.replace(kind=parameter.KEYWORD_ONLY)
            taken.setdefault(parameter.name, parameter)
        if all(p.kind is not p.VAR_KEYWORD for p in parameters):
            break
    fixed = getattr(cls, 'fixed_args', ())
    return {name: parameter for name, parameter in taken.items() if name not in fixed}


def _init_cfg_of(pretrained: Any, init_cfg: Any, owner: str) -> Any:
    """``pretrained=...`` as an ``init_cfg``.

    mmseg's base models carry weights of their ResNet there and hand them to whatever backbone takes
    its place.
    """
    mended = (
        f'set model=dict(pretrained=None) and give {owner} its weights by '
        "init_cfg=dict(type='Pretrained', checkpoint=...)"
    )
    if entries_of(init_cfg):
        print_log(
            f'{owner}: pretrained={pretrained!r} is left out, since init_cfg says {init_cfg}',
            logger='current',
            level=logging.WARNING,
        )
        return init_cfg
    if not isinstance(pretrained, (str, os.PathLike)):
        raise TypeError(f'pretrained={pretrained!r} is no file; {mended}')
    name = os.fspath(pretrained)
    if name.startswith(tuple(ZOOS)) and not any(family in name for family in TRANSFORMERS):
        raise ValueError(
            f'pretrained={name!r} is of another backbone than {owner}; it comes from the model '
            f'of a base config: {mended}'
        )
    print_log(
        f"{owner}: pretrained={name!r} is taken as init_cfg=dict(type='Pretrained', "
        f'checkpoint={name!r})',
        logger='current',
        level=logging.WARNING,
    )
    return dict(type='Pretrained', checkpoint=name)
