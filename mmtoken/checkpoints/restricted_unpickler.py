"""Read files of ``torch.save`` without running anything in them.

A pickle is a program: it names functions of any installed package and calls them. With
``weights_only=True`` torch refuses all names but those that weights need. Released checkpoints also
hold what the training script had at hand (``argparse.Namespace``, yacs nodes, MMEngine's
histories). They are read a second time, by an unpickler to which every unknown name is a class that
accepts anything and does nothing.

The private functions of torch that reading needs are used in this file only.
"""

import pickle
import tarfile
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..runtime.torch_private import rebuild_tensor, records_of_archive
from .archive import check_archive

ZIP_MAGIC = b'PK\x03\x04'  # by which torch.load recognizes its current format


def load_torch(path: Path) -> Any:
    """The content of a file of ``torch.save``, on the CPU.

    Tensors and plain data are read; every other object becomes an :class:`Inert`.

    Raises:
        ValueError: An archive of TorchScript, whose code ``torch.load`` would run, or of tar, which
            it would extract; one that is damaged or far larger than the file.
        Exception: Of any type, where the file is damaged.
    """
    with path.open('rb') as stream:
        is_zip = stream.read(len(ZIP_MAGIC)) == ZIP_MAGIC
    if is_zip:
        check_archive(path)
    if is_zip and is_torchscript(path):
        raise ValueError(
            'a TorchScript archive is code; save the state_dict() of torch.jit.load(file) instead'
        )
    if not is_zip and tarfile.is_tarfile(path):
        raise ValueError('a tar archive; unpack it and give the file in it')
    # Mapped, tensors that are not used (mostly the optimizer's) are never read; and torch 2.1 would
    # otherwise believe the lengths in the pickle and read beyond a shorter record.
    options = dict(map_location='cpu', mmap=is_zip)
    try:
        with warnings.catch_warnings():  # that it does not know all of protocol 4
            warnings.simplefilter('ignore', UserWarning)
            return torch.load(str(path), weights_only=True, **options)
    except Exception:  # an unknown name, or damage, at which the second reading fails too
        return torch.load(str(path), weights_only=False, pickle_module=RESTRICTED, **options)


def is_torchscript(path: Path) -> bool:
    """Whether ``torch.load`` would hand this zip file to ``torch.jit.load``; it asks the same."""
    return 'constants.pkl' in records_of_archive(path)


class Inert:
    """What an unknown name becomes, as a class and as its instances."""

    def __new__(cls, *args, **kwargs) -> 'Inert':
        return super().__new__(cls)

    def __init__(self, *args, **kwargs) -> None:
        pass

    def ignore(self, *args, **kwargs) -> 'Inert':
        return self

    __call__ = __setstate__ = __setitem__ = append = extend = add = ignore


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
        return rebuild_tensor(storage, offset, size, stride)


class _RebuildParameter(_Sealed):
    """For ``torch._utils._rebuild_parameter``: the tensor itself."""

    __slots__ = ()

    def __call__(self, data: Tensor, *_) -> Tensor:
        return data


# Storage types are not among them: torch.load has its own table of those.
KNOWN_NAMES = {
    ('collections', 'OrderedDict'): _Dict,
    ('torch._utils', '_rebuild_tensor'): _RebuildTensor(),
    ('torch._utils', '_rebuild_tensor_v2'): _RebuildTensor(),
    ('torch._utils', '_rebuild_parameter'): _RebuildParameter(),
    ('torch._utils', '_rebuild_parameter_with_state'): _RebuildParameter(),
}


class RestrictedUnpickler(pickle.Unpickler):
    """Looks names up in a table instead of importing them."""

    def find_class(self, module: str, name: str) -> Any:
        # Each time a new class, so that none is shared with another part of the file.
        return KNOWN_NAMES.get((module, name)) or type(f'{module}.{name}', (Inert,), {})


# For torch.load, in the place of the module pickle
RESTRICTED = SimpleNamespace(
    __name__=__name__,
    Unpickler=RestrictedUnpickler,
    load=lambda file, **kwargs: RestrictedUnpickler(file, **kwargs).load(),
)
