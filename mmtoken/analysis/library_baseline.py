"""OpenMMLab's own backbone of the same widths, the usual alternative to one of ours."""

import inspect
from importlib.util import find_spec

from .twin import our_class


def library_baseline(backbone: dict) -> dict | None:
    """Config of the backbone that OpenMMLab has in place of one of ours.

    Args:
        backbone: Config of a backbone of ours.

    Returns:
        A config with the same widths, depths and outputs, from
        :meth:`~mmtoken.backbones.base.TokenBackbone.library_baseline`; None if there is no such
        backbone or its library is not installed.
    """
    cls = our_class(backbone)
    args = {name: p.default for name, p in inspect.signature(cls).parameters.items()} | backbone
    args['arch'] = cls.full_arch(args['arch'])
    baseline = cls.library_baseline(args)
    if baseline is None:
        return None
    installed = (name for name in baseline['type'] if find_spec(name.partition('.')[0]))
    name = next(installed, None)
    return None if name is None else baseline | dict(type=name)
