"""Plain layers: of the class they were built as, with ordinary weights and without hooks.

A fast path may read the weights of a layer instead of calling it, or call it with a part of the
tokens at a time. For plain layers the result is the same. If a layer has been replaced (an adapter,
a quantized layer), parametrized or given a hook, the difference would show, so the ordinary path is
taken: every layer is called once, with whole tensors.

Layers are checked at every call, so one may be replaced at any time.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn as nn
from timm.layers import DropPath, LayerScale, Mlp
from torch import Tensor
from torch.nn.modules import module as torch_module

from ...runtime.reference import is_compiling

# Known classes and their forward, which reveals a class that has been patched
_KNOWN: dict[type[nn.Module], Callable] = {
    kind: kind.forward
    for kind in (
        nn.BatchNorm2d, nn.Conv2d, nn.Dropout, nn.GELU, nn.Hardswish, nn.Identity, nn.LayerNorm,
        nn.Linear, nn.ModuleList, nn.Sequential, DropPath, LayerScale, Mlp,
    )
}  # fmt: skip
_RATES = {nn.Dropout: 'p', DropPath: 'drop_prob'}
_WEIGHTS = (nn.Parameter, Tensor)
# The hooks that torch checks before it calls a forward directly
_HOOKS = ('_forward_hooks', '_forward_pre_hooks', '_backward_hooks', '_backward_pre_hooks')

_heed_hooks = ContextVar('mmtoken_heed_hooks', default=True)


@contextmanager
def hooks_ignored() -> Iterator[None]:
    """Inside this context hooks do not change the path.

    For counters that use hooks to measure the cost without hooks.
    """
    token = _heed_hooks.set(False)
    try:
        yield
    finally:
        _heed_hooks.reset(token)


def _hooks_count() -> bool:
    return is_compiling() or _heed_hooks.get()  # torch.compile cannot trace a ContextVar


def know(kind: type[nn.Module]) -> None:
    """Register a class, but not its subclasses, as known."""
    _KNOWN.setdefault(kind, kind.forward)


def all_plain(*modules: nn.Module) -> bool:
    """Whether modules and all their submodules are plain.

    Each is of a known class, exactly, with the forward of that class, ordinary weights, no active
    dropout and no hooks. The check takes about a microsecond for each module.
    """
    if _all_are_watched():
        return False
    rest = list(modules)
    while rest:
        module = rest.pop()
        if module is not None:
            if not _is_plain(module):
                return False
            rest += module._modules.values()
    return True


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a single module is plain, see :func:`all_plain`, and of this very class."""
    return type(module) is kind and not _all_are_watched() and _is_plain(module)


def is_plain_conv(
    conv: nn.Module, kernel_size: int, stride: int = 1, padding: int = 0, groups: int = 1
) -> bool:
    """Whether a layer is a plain convolution of this geometry, see :func:`has_geometry`."""
    return is_plain(conv, nn.Conv2d) and has_geometry(conv, kernel_size, stride, padding, groups)


def has_geometry(
    conv: nn.Conv2d, kernel_size: int, stride: int = 1, padding: int = 0, groups: int = 1
) -> bool:
    """Whether a convolution is square and zero-padded, with just these sizes."""
    return (
        conv.kernel_size == (kernel_size, kernel_size)
        and conv.stride == (stride, stride)
        and conv.padding == (padding, padding)
        and conv.dilation == (1, 1)
        and conv.groups == groups
        and conv.padding_mode == 'zeros'
    )


def weight_dtype(layer: nn.Module) -> torch.dtype:
    """The dtype that the input of a layer is cast to: that of its first floating-point weight.

    float32 for a layer without any, such as a dynamically quantized one.
    """
    return next((p.dtype for p in layer.parameters() if p.is_floating_point()), torch.float32)


def draws(layer: nn.Module) -> bool:
    """Whether stochastic depth is active: the layer trains, and its rate is not 0.

    A layer that replaces it may have no rate, and then counts as active.
    """
    return layer.training and bool(getattr(layer, 'drop_prob', True))


def _is_plain(module: nn.Module) -> bool:
    kind, state = type(module), module.__dict__
    if _KNOWN.get(kind) is not kind.forward or 'forward' in state:
        return False
    if _hooks_count() and any(map(state.get, _HOOKS)):
        return False
    for weight in state['_parameters'].values():
        if weight is not None and type(weight) not in _WEIGHTS:
            return False
    return not (state['training'] and kind in _RATES and getattr(module, _RATES[kind]))


def _all_are_watched() -> bool:
    """Whether there are global module hooks."""
    return _hooks_count() and bool(
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )
