"""Files and folders that are replaced as a whole."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path to write a file or a folder to, which then replaces ``path`` in one step.

    If the block raises, what was written is removed and ``path`` stays as it was. Parents of
    ``path`` are made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # In a sibling, which is on the same file system: a rename is one step.
    with tempfile.TemporaryDirectory(prefix=f'.{path.name}-', dir=path.parent) as scratch:
        new, old = Path(scratch, path.name), Path(scratch, 'old')
        yield new
        if not path.is_dir():
            new.replace(path)
            return
        path.rename(old)  # no folder replaces another that is not empty
        try:
            new.rename(path)
        except BaseException:
            old.rename(path)
            raise
