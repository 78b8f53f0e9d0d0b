"""Read a checkpoint file, and find the weights in it, without running anything."""

import os
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from .download import fetch, is_url, resolve
from .report import shorten
from .restricted_unpickler import load_torch

WRAPPERS = ('state_dict', 'model', 'model_ema', 'teacher')  # the last is DINO's


def read_checkpoint(file: str | os.PathLike) -> Any:
    """Read a file of ``torch.save``, of any version, or of safetensors, on the CPU.

    Tensors and plain data are read; every other object becomes an
    :class:`~mmtoken.checkpoints.restricted_unpickler.Inert`.

    Args:
        file: Path or URL, or another name that MMEngine takes.

    Raises:
        FileNotFoundError: No such file.
        OSError: A failed download, a folder, or a file that may not be read.
        ValueError: The file is damaged or of another format; the message has its first bytes.
    """
    name = os.fspath(file)
    path = fetch(name)
    with path.open('rb') as stream:
        head = stream.read(24)
    try:
        return load_file(path) if _is_safetensors(head) else load_torch(path)
    except Exception as error:  # readers meet damage with exceptions of any type
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        hint = f'; delete {path} to download it again' if is_url(resolve(name)) else ''
        raise ValueError(
            f'{name} is damaged or no checkpoint: {reason} (it begins with {head!r}){hint}'
        ) from error


def find_weights(checkpoint: Any, file: str | os.PathLike) -> dict[str, Tensor]:
    """The tensors of a checkpoint by their names.

    A training checkpoint is unwrapped (``'state_dict'``, ``'model'``, ``'model_ema'``,
    ``'teacher'``, in this order).

    Args:
        checkpoint: What :func:`read_checkpoint` returned.
        file: Where it is from, for messages.

    Raises:
        ValueError: It holds no mapping of names to tensors, or tensors without values of their own
            (on the meta device, sparse, quantized).
    """
    for key in WRAPPERS:
        if isinstance(checkpoint, Mapping) and isinstance(checkpoint.get(key), Mapping):
            checkpoint = checkpoint[key]
    is_mapping = isinstance(checkpoint, Mapping)
    weights = {
        name: tensor.detach()
        for name, tensor in (checkpoint.items() if is_mapping else ())
        if isinstance(name, str) and isinstance(tensor, Tensor)
    }
    if unusual := [name for name, tensor in weights.items() if not _is_plain(tensor)]:
        raise ValueError(
            f'{os.fspath(file)} holds tensors that are sparse, quantized or on the meta device: '
            f'{", ".join(shorten(unusual))}; save them as ordinary ones'
        )
    if weights:
        return weights
    found = f'a {type(checkpoint).__name__}'
    if is_mapping:
        found = f'a mapping with the keys {", ".join(shorten(map(repr, checkpoint)))}'
    raise ValueError(f'{os.fspath(file)} holds no weights, as state_dict() gives them, but {found}')


def _is_plain(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not (tensor.is_meta or tensor.is_quantized)


def _is_safetensors(head: bytes) -> bool:
    """Whether JSON follows eight bytes with its length."""
    return head[8:9] == b'{' and head[6:8] == b'\0\0'
