"""The dense twin of a config: the same network without token reduction.

What a class of ours has for it:

* ``twin_args``: constructor arguments that switch its token reduction off.
* ``twin_type``, of a neck that restores tokens: the neck that takes maps in its place.
* ``dense_args``, of a neck for maps: values that arguments for sparse backbones have in the twin.
"""

import copy
import inspect
from collections.abc import Iterator, Mapping
from typing import TypeVar

from mmengine.config import Config
from mmengine.utils import get_object_from_string

from ..backbones.base import TokenBackbone
from ..registry import MODELS

# A dense twin has no use for these
TOKEN_HOOKS = ('TokenLossHook', 'TokenMapHook', 'TwinDistillHook')
Cfg = TypeVar('Cfg', dict, Config)


def dense_twin(cfg: Cfg) -> Cfg:
    """Config of the dense twin.

    Args:
        cfg: Config of a backbone, of a neck, or of a model that contains one at any depth, or a
            whole ``Config``; types are names or classes.

    Returns:
        A changed deep copy: backbones and necks of ours compute densely and return maps, necks
        that restore tokens are replaced by necks that take maps, and the hooks for token losses,
        for token maps and for teaching by a dense twin are removed from a ``Config``. The config of
        a dense twin is returned unchanged.

    Raises:
        TypeError: ``cfg`` is no mapping.
        ValueError: It contains no backbone or neck of ours that has a dense twin.
    """
    cfg = copy.deepcopy(cfg)
    if isinstance(cfg, Config):
        if 'model' not in cfg:
            raise ValueError(f'the config has no model; its keys are {sorted(cfg.keys())}')
        _make_dense(cfg.model)
        if cfg.get('custom_hooks'):
            cfg.custom_hooks = [h for h in cfg.custom_hooks if not _is_token_hook(h)]
        for name, hook in list(cfg.get('default_hooks', {}).items()):
            if _is_token_hook(hook):
                del cfg.default_hooks[name]
    elif isinstance(cfg, dict):
        _make_dense(cfg)
    else:
        raise TypeError(f'cfg must be a dict or a Config, got {type(cfg).__name__}')
    return cfg


def find_backbone(cfg: dict) -> dict:
    """The first backbone of ours in the config of a backbone or a model; not a copy.

    Raises:
        ValueError: There is none.
    """
    return _first(cfg, 'backbone', TokenBackbone)


def find_sparse(cfg: dict) -> dict:
    """The first backbone or neck of ours that has a dense twin; not a copy.

    Raises:
        ValueError: There is none.
    """
    return _first(cfg, 'backbone or neck', object)


def _first(cfg: dict, kind: str, base: type) -> dict:
    for part in mappings(cfg):
        cls = our_class(part)
        if hasattr(cls, 'twin_args') and issubclass(cls, base):
            return part
    models = [model for model in mappings(cfg) if isinstance(model.get('backbone'), Mapping)]
    given = [model['backbone'].get('type') for model in models] or [cfg.get('type')]
    raise ValueError(
        f'the config has no {kind} of mmtoken, only {", ".join(map(repr, given))}; '
        f'known are {", ".join(known_parts(base))}'
    )


def _make_dense(cfg: dict) -> None:
    find_sparse(cfg)  # raises if there is none
    for part in list(mappings(cfg)):
        cls = our_class(part)
        if hasattr(cls, 'twin_args'):
            part.update(cls.twin_args)
            if part.get('out_type') == 'tokens':
                part['out_type'] = 'map'
        if hasattr(cls, 'twin_type'):
            part['type'] = cls.twin_type
            accepted = inspect.signature(our_class(part)).parameters
            for name in part.keys() - accepted.keys() - {'type'}:
                del part[name]
        part.update({k: v for k, v in getattr(cls, 'dense_args', {}).items() if k in part})


def known_parts(base: type = TokenBackbone) -> list[str]:
    """Names, as in configs, of our subclasses of ``base`` that have a dense twin."""
    MODELS.import_from_location()
    return sorted(
        f'{MODELS.scope}.{name}'
        for name, cls in MODELS.module_dict.items()
        if hasattr(cls, 'twin_args') and issubclass(cls, base)
    )


def our_class(cfg: Mapping) -> type | None:
    """The class under ``type`` if it is one of ours or a subclass of one, else None.

    A type is a class, its name with or without the prefix ``mmtoken.``, or the path to import it
    from, which MMEngine writes in place of classes.
    """
    given = cfg.get('type')
    MODELS.import_from_location()
    if isinstance(given, str):
        name = given.removeprefix(f'{MODELS.scope}.')
        if name in MODELS.module_dict or name == given or '.' not in name:
            return MODELS.module_dict.get(name)
        given = get_object_from_string(given)
    # `register_all_modules` adds functions that build whole models.
    ours = tuple(filter(inspect.isclass, MODELS.module_dict.values()))
    return given if isinstance(given, type) and issubclass(given, ours) else None


def mappings(node) -> Iterator[dict]:
    """A config and all mappings in it, outermost first."""
    if isinstance(node, Mapping):
        yield node
        node = list(node.values())
    if isinstance(node, (list, tuple)):
        for child in node:
            yield from mappings(child)


def _is_token_hook(hook: object) -> bool:
    """Whether a config names one of :data:`TOKEN_HOOKS`, by its name or its class."""
    given = hook.get('type') if isinstance(hook, Mapping) else type(hook)
    name = given.__name__ if isinstance(given, type) else str(given).rpartition('.')[2]
    return name in TOKEN_HOOKS
