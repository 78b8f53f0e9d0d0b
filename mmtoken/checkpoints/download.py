"""Find checkpoints by any name that MMEngine accepts; those from the web are kept on disk."""

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

# Prefix of a name to the function of MMEngine that gives the table of addresses
ZOOS = {
    'open-mmlab://': 'get_external_models',
    'openmmlab://': 'get_external_models',
    'torchvision://': 'get_torchvision_models',
    'modelzoo://': 'get_torchvision_models',
    'mmcls://': 'get_mmcls_models',
}
HASH = re.compile(r'-([0-9a-f]{8,})\.')  # in a file name: the first digits of its SHA-256


def is_url(file: str) -> bool:
    """Whether ``file`` is to be downloaded rather than opened."""
    return file.startswith(('http://', 'https://'))


def resolve(file: str | os.PathLike) -> str:
    """A path or a web address for any name that MMEngine accepts.

    ``~`` is the home folder. ``open-mmlab://``, ``torchvision://`` and ``mmcls://`` name models in
    MMEngine's tables.

    Raises:
        ValueError: The name is not in its table.
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
    """The file, if it is on this disk already."""
    name = resolve(file)
    if is_url(name):
        return next((path for path in _kept_paths(name) if path.exists()), None)
    return Path(name) if '://' not in name and Path(name).exists() else None


def fetch(file: str | os.PathLike) -> Path:
    """The file on this disk, downloaded if necessary.

    Raises:
        OSError: The download failed; the message says where to put the file by hand.
        ValueError: The name is not known.
    """
    name = resolve(file)
    if is_url(name):
        return download(name)
    if '://' in name:  # s3://, petrel:// and others for which MMEngine has a backend
        return _fetch_by_backend(name)
    return Path(name)


def _fetch_by_backend(name: str) -> Path:
    path = cached_path(name)
    if not path.exists():
        try:
            with get_local_path(name) as local, replacing(path) as new:
                shutil.copyfile(local, new)
        except Exception as error:  # whatever a backend may raise
            raise OSError(f'MMEngine could not fetch {name}: {error}') from error
    return path


def download(url: str) -> Path:
    """Download a file once, into torch.hub's folder.

    A file that was put there by hand, under its own name, is used, if it has the hash in its name.
    In a distributed run all processes must call this: the first one of each machine downloads, and
    the others wait.

    Args:
        url: An ``http`` or ``https`` address. Different addresses never share a file.

    Returns:
        Path of the file.

    Raises:
        OSError: The download failed; the message says where to put the file by hand.
    """
    by_hand = _kept_paths(url)[1]
    if by_hand.exists() and not cached_path(url).exists():
        print_log(f'{url} is not downloaded: {by_hand} is used', logger='current')
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
        reason = f': {failure}' if failure else ' by the first process of this machine'
        raise OSError(
            f'{url} was not downloaded{reason}. Without a connection, put the file at '
            f'{by_hand} or give its path: checkpoint="/path/to/{by_hand.name}"'
        ) from failure
    return path


def cached_path(url: str) -> Path:
    """Where the file of an address is kept."""
    name = Path(unquote(urlparse(url).path)).name
    digest = hashlib.sha256(url.encode()).hexdigest()[:8]
    return Path(torch.hub.get_dir()) / 'checkpoints' / f'{digest}-{name}'


def _kept_paths(url: str) -> tuple[Path, Path]:
    """Where :func:`download` keeps a file, and where torch.hub, MMEngine or a user puts it."""
    path = cached_path(url)
    return path, path.with_name(path.name.partition('-')[2])


def _check_hash(path: Path) -> None:
    """Raise an OSError if the name of a file has a hash that is not the file's."""
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
            f'{path} is damaged or another file: its SHA-256 begins with {digest[:8]}, not with '
            f'the {found[1]} of its name; remove it'
        )
