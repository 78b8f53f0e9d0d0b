"""Replace a folder as a whole, if this tool made it."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmtoken.files import replacing

GENERATOR = 'mmtoken make_shapes'
SUMMARY_NAME = 'shapes.json'


@contextmanager
def fresh_folder(out: Path, force: bool) -> Iterator[Path]:
    """Yield an empty folder that replaces ``out`` if the block succeeds.

    If the block raises, what was written is removed and ``out`` stays as it was.

    Args:
        out: Folder to make; its parents are made too.
        force: Replace ``out`` if it holds a data set that this tool made.

    Raises:
        FileExistsError: If ``out`` is a file, or is not empty and must not be replaced.
    """
    out = out.resolve()
    _check_free(out, force)
    with replacing(out) as new:
        new.mkdir()
        yield new


def _check_free(out: Path, force: bool) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise FileExistsError(f'{out} is a file; name a folder that is empty or does not exist')
    if not any(out.iterdir()):
        return
    if not _is_own(out):
        raise FileExistsError(
            f'{out} is not empty and was not made by this tool; --force does not replace it'
        )
    if not force:
        raise FileExistsError(f'{out} holds a data set already; --force replaces it')


def _is_own(folder: Path) -> bool:
    try:
        summary = json.loads((folder / SUMMARY_NAME).read_text())
    except (OSError, ValueError):
        return False
    return isinstance(summary, dict) and summary.get('generator') == GENERATOR
