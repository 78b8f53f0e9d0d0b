"""A stand-in for :mod:`pickle` that can build tensors and dictionaries, and nothing else.

A pickle is a program: it names functions of any installed package and calls them. Checkpoints of
other projects hold, beside their weights, whatever the training script had at hand
(``argparse.Namespace``, yacs nodes, MMEngine's histories), so that refusing unknown names would
refuse the files. Here every name but the few that tensors need stands for a class that accepts
anything and does nothing.

Given to ``torch.load`` as its ``pickle_module``.
"""

import pickle
from typing import Any, BinaryIO

import torch
from torch import Tensor


class Inert:
    """What an unknown global becomes, as a class and as its instances.

    Attributes:
        origin: The name in the file, for messages.
    """

    origin = ''

    def __new__(cls, *args, **kwargs) -> 'Inert':
        return super().__new__(cls)

    def __init__(self, *args, **kwargs) -> None:
        pass

    def __call__(self, *args, **kwargs) -> 'Inert':
        return Inert()

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        pass

    def extend(self, items: Any) -> None:
        pass

    def add(self, item: Any) -> None:
        pass


class _Sealed:
    """Ignores the state a pickle gives it, which could otherwise replace its attributes."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        pass


class _Dict(_Sealed, dict):
    """For ``OrderedDict``: dictionaries keep their order anyway."""

    __slots__ = ()


class _RebuildTensor(_Sealed):
    """For ``torch._utils._rebuild_tensor_v2``; hooks and gradient flags are left out."""

    __slots__ = ()

    def __call__(self, storage: Any, offset: int, size: tuple, stride: tuple, *_) -> Tensor:
        return torch._utils._rebuild_tensor(storage, offset, size, stride)


class _RebuildParameter(_Sealed):
    """For ``torch._utils._rebuild_parameter``: the tensor itself."""

    __slots__ = ()

    def __call__(self, data: Tensor, *_) -> Tensor:
        return data


# Storage types are not among them: torch.load keeps to its own table of those.
_ADMITTED = {
    ('collections', 'OrderedDict'): _Dict,
    ('torch._utils', '_rebuild_tensor'): _RebuildTensor(),
    ('torch._utils', '_rebuild_tensor_v2'): _RebuildTensor(),
    ('torch._utils', '_rebuild_parameter'): _RebuildParameter(),
    ('torch._utils', '_rebuild_parameter_with_state'): _RebuildParameter(),
}


class Unpickler(pickle.Unpickler):
    """Resolves names in a table instead of importing them."""

    def find_class(self, module: str, name: str) -> Any:
        admitted = _ADMITTED.get((module, name))
        if admitted is not None:
            return admitted
        return type('Inert', (Inert,), dict(origin=f'{module}.{name}'))


def load(file: BinaryIO, **kwargs) -> Any:
    """As :func:`pickle.load`."""
    return Unpickler(file, **kwargs).load()
