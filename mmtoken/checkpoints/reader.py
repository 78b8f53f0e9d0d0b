"""Read a checkpoint file without running anything in it.

Source: the formats of ``torch.save``, before and since torch 1.6, and of safetensors.
"""

import os
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints import inert_pickle
from .download import fetch, is_url, resolve

WRAPPERS = ('state_dict', 'model', 'model_ema', 'teacher')  # the last is DINO's
ZIP_MAGIC = b'PK\x03\x04'
PICKLE_MAGIC = b'\x80'
COMPRESSED_MAGICS = (b'\x1f\x8b', b'BZh', b'\xfd7zXZ')
HEAD_LENGTH = 64


def read_checkpoint(file: str | os.PathLike) -> Any:
    """Read a file of ``torch.save`` or safetensors, on the CPU.

    Tensors and plain data are read; every other object becomes an
    :class:`~mmtoken.checkpoints.inert_pickle.Inert`.

    Args:
        file: Path or URL, or another name that MMEngine takes.

    Raises:
        FileNotFoundError: No such file.
        OSError: A failed download, or a file that may not be read.
        ValueError: The file is damaged or of another format; the message says what it is.
    """
    name = os.fspath(file)
    path = fetch(name)
    if not path.exists():
        raise FileNotFoundError(
            f'{path} does not exist (from {Path.cwd()}); a checkpoint is a file or an http(s) URL'
        )
    if path.is_dir():
        raise ValueError(f'{name} is a folder; give a file in it')
    with path.open('rb') as stream:
        head = stream.read(HEAD_LENGTH)
    try:
        if head.startswith(ZIP_MAGIC):
            return _read_zip(path)
        if head.startswith(COMPRESSED_MAGICS):
            raise _NotACheckpoint('is a compressed file; unpack it')
        if tarfile.is_tarfile(path):  # whose members torch.load would extract
            raise _NotACheckpoint('is a tar archive; unpack it and give the file in it')
        if head.startswith(PICKLE_MAGIC):
            return _read_legacy(path)
        if _is_safetensors(head):
            return _read_safetensors(path)
    except _NotACheckpoint as error:
        raise ValueError(f'{name} {error}') from None
    except Exception as error:  # readers meet damage with exceptions of any type
        hint = f'; delete {path}, so that it is downloaded again' if is_url(resolve(name)) else ''
        raise ValueError(
            f'{name} is damaged, incomplete or no checkpoint: {_first_line(error)}{hint}'
        ) from error
    raise ValueError(f'{name} is no checkpoint: it is {_describe(head)}')


def find_weights(checkpoint: Any, file: str | os.PathLike) -> dict[str, Tensor]:
    """The tensors of a checkpoint by their names.

    A training checkpoint is unwrapped (``'state_dict'``, ``'model'``, ``'model_ema'``, in this
    order).

    Args:
        checkpoint: What :func:`read_checkpoint` returned.
        file: Where it is from, for messages.

    Raises:
        ValueError: It holds no mapping of names to tensors.
    """
    for key in WRAPPERS:
        if isinstance(checkpoint, Mapping) and isinstance(checkpoint.get(key), Mapping):
            checkpoint = checkpoint[key]
    if isinstance(checkpoint, Mapping):
        weights = {
            name: tensor.detach()
            for name, tensor in checkpoint.items()
            if isinstance(name, str) and isinstance(tensor, Tensor)
        }
        if weights:
            return weights
    raise ValueError(
        f'{os.fspath(file)} holds no weights: no mapping of names to tensors was found in it, but '
        f'{_summarise(checkpoint)}'
    )


class _NotACheckpoint(Exception):
    """A readable file without tensors to read; says what it is."""


def _read_zip(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        if not any(name.endswith('/data.pkl') for name in archive.namelist()):
            raise _NotACheckpoint('is a zip archive that torch.save did not write')
    # Asked in the way of torch.load, which would hand such an archive to torch.jit.load
    if 'constants.pkl' in torch._C.PyTorchFileReader(str(path)).get_all_records():
        raise _NotACheckpoint(
            'is a TorchScript archive, which is code; save the state_dict() of '
            'torch.jit.load(file) instead'
        )
    # Mapped, tensors that are not used (of the optimizer, most often) are never read; and torch
    # 2.1 would otherwise believe the lengths in the pickle and read beyond a shorter record.
    return torch.load(
        str(path), map_location='cpu', pickle_module=inert_pickle, weights_only=False, mmap=True
    )


def _read_legacy(path: Path) -> Any:
    return torch.load(str(path), map_location='cpu', pickle_module=inert_pickle, weights_only=False)


def _is_safetensors(head: bytes) -> bool:
    """The length of the header, in eight bytes, comes before it; the header is JSON."""
    return head[8:9] == b'{' and head[6:8] == b'\0\0'


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors.torch import load_file
    except ModuleNotFoundError:
        raise _NotACheckpoint(
            'is a safetensors file, and safetensors is not installed: pip install safetensors'
        ) from None
    return load_file(path)


def _describe(head: bytes) -> str:
    if not head:
        return 'empty'
    if head.startswith(b'version https://git-lfs'):
        return 'a pointer of git-lfs; fetch the file itself with `git lfs pull`'
    if head.lstrip().lower().startswith((b'<!doctype', b'<html', b'<?xml')):
        return 'a web page; the download answered with an error, or the address is of a page'
    return f'a file that begins with {head[:24]!r}'


def _summarise(checkpoint: Any) -> str:
    if isinstance(checkpoint, inert_pickle.Inert):
        return (
            f'a pickled {checkpoint.origin[:80] or "object"}, whose code is not run; save its '
            'state_dict() instead'
        )
    if isinstance(checkpoint, Mapping):
        keys = [str(key)[:40] for key in checkpoint]
        more = f' and {len(keys) - 8} more' if len(keys) > 8 else ''
        return f'a mapping with the keys {keys[:8]}{more}'
    return f'a {type(checkpoint).__name__}'


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
