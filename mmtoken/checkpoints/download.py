"""Checkpoints from the web, kept on disk."""

import hashlib
import os
from pathlib import Path
from urllib.parse import unquote, urlparse

import torch
from mmengine.dist import barrier


def is_url(file: str) -> bool:
    """Whether ``file`` is to be downloaded rather than opened."""
    return file.startswith(('http://', 'https://'))


def download(url: str) -> Path:
    """Download a file once, into torch.hub's folder.

    In a distributed run the first process of each machine downloads and the others wait for it, so
    all of them must call this.

    Args:
        url: An ``http`` or ``https`` address. Different addresses never share a file.

    Returns:
        Path of the file.

    Raises:
        OSError: The download failed; the message names the address.
    """
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
            f'{url} was not downloaded{reason}; download it by other means and give its path'
        ) from failure
    return path


def cached_path(url: str) -> Path:
    """Where the file of an address is kept."""
    name = Path(unquote(urlparse(url).path)).name
    digest = hashlib.sha256(url.encode()).hexdigest()[:8]
    return Path(torch.hub.get_dir()) / 'checkpoints' / f'{digest}-{name}'
