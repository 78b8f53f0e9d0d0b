"""Checkpoints by any path that MMEngine takes; those from the web are kept on disk."""

import hashlib
import os
import re
import shutil
from pathlib import Path
from urllib.parse import unquote, urlparse

import torch
from mmengine.dist import barrier
from mmengine.fileio import get_local_path
from mmengine.logging import print_log
from mmengine.runner import checkpoint as mmengine_names

from ..files import replacing

# Prefix of a name to the table that has its address
ZOOS = {
    'open-mmlab://': 'get_external_models',
    'openmmlab://': 'get_external_models',
    'torchvision://': 'get_torchvision_models',
    'modelzoo://': 'get_torchvision_models',
    'mmcls://': 'get_mmcls_models',
}
HASH = re.compile(r'-([0-9a-f]{8,})\.')  # in a file name: how its SHA-256 begins


def is_url(file: str) -> bool:
    """Whether ``file`` is to be downloaded rather than opened."""
    return file.startswith(('http://', 'https://'))


def resolve(file: str | os.PathLike) -> str:
    """A path or a web address for any name that MMEngine takes.

    ``~`` is the home folder. ``open-mmlab://``, ``torchvision://`` and ``mmcls://`` name models in
    tables of MMEngine's.

    Raises:
        ValueError: A name that is not in its table, or a prefix that is not known.
    """
    name = os.fspath(file)
    for prefix, table in ZOOS.items():
        if name.startswith(prefix):
            models = getattr(mmengine_names, table)()
            model = name.removeprefix(prefix)
            if model not in models:
                raise ValueError(f'{name}: {prefix} has no model {model!r}')
            return models[model]
    return name.removeprefix('file://') if '://' in name else os.path.expanduser(name)


def find_local(file: str | os.PathLike) -> Path | None:
    """The file on this disk, if it is there without a download."""
    name = resolve(file)
    if is_url(name):
        return next((path for path in _kept_paths(name) if path.exists()), None)
    return Path(name) if '://' not in name and Path(name).exists() else None


def fetch(file: str | os.PathLike) -> Path:
    """The file on this disk, downloaded if need be.

    Raises:
        FileNotFoundError: No such file.
        OSError: The download failed; the message says where to put the file by hand.
        ValueError: A name that is not known.
    """
    name = resolve(file)
    if is_url(name):
        return download(name)
    if '://' in name:  # s3://, petrel:// and what else MMEngine has a backend for
        return _fetch_by_backend(name)
    return Path(name)


def _fetch_by_backend(name: str) -> Path:
    path = cached_path(name)
    if not path.exists():
        try:
            with get_local_path(name) as local, replacing(path) as new:
                shutil.copyfile(local, new)
        except Exception as error:  # whatever a backend may raise
            raise OSError(f'{name} was not fetched by MMEngine: {error}') from error
    return path


def download(url: str) -> Path:
    """Download a file once, into torch.hub's folder.

    A file that was put there by hand, under its own name, is taken, if it has the hash in its name.
    In a distributed run the first process of each machine downloads and the others wait for it, so
    all of them must call this.

    Args:
        url: An ``http`` or ``https`` address. Different addresses never share a file.

    Returns:
        Path of the file.

    Raises:
        OSError: The download failed; the message names the address and both ways out.
    """
    by_hand = _kept_paths(url)[1]
    if by_hand.exists() and not cached_path(url).exists():
        print_log(f'{url} is not downloaded: {by_hand} is there', logger='current')
        _check_hash(by_hand)
        return by_hand
    path = cached_path(url)
    failure = None
    if int(os.environ.get('LOCAL_RANK', 0)) == 0 and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), progress=True)
        except Exception as error:  # whatever urllib and the protocols below it may raise
            failure = error
    barrier()
    if not path.exists():
        reason = f': {failure}' if failure else ' by the process that should have'
        raise OSError(
            f'{url} was not downloaded{reason}. Without a connection, either put the file at '
            f'{by_hand}, or give its path: checkpoint="/path/to/{by_hand.name}"'
        ) from failure
    return path


def cached_path(url: str) -> Path:
    """Where the file of an address is kept."""
    name = Path(unquote(urlparse(url).path)).name
    digest = hashlib.sha256(url.encode()).hexdigest()[:8]
    return Path(torch.hub.get_dir()) / 'checkpoints' / f'{digest}-{name}'


def _kept_paths(url: str) -> tuple[Path, Path]:
    """Where a file is kept by :func:`download`, and where by torch.hub, MMEngine or hand."""
    path = cached_path(url)
    return path, path.with_name(path.name.partition('-')[2])


def _check_hash(path: Path) -> None:
    """Refuse a file whose name has the beginning of another hash.

    Raises:
        OSError: It is another file, or was cut off.
    """
    found = HASH.search(path.name)
    if found is None:
        return
    sha256 = hashlib.sha256()
    with path.open('rb') as stream:
        while piece := stream.read(2**20):
            sha256.update(piece)
    digest = sha256.hexdigest()
    if not digest.startswith(found[1]):
        raise OSError(
            f'{path} is damaged or another file: its SHA-256 begins with {digest[:8]}, and its '
            f'name says {found[1]}; remove it'
        )
