"""Checks of the zip archive that ``torch.save`` writes, before anything in it is read."""

import zipfile
from pathlib import Path

# Content over the size of the file. ``torch.save`` does not compress, and weights that somebody
# has compressed shrink little.
MOST_EXPANSION = 8


def check_archive(path: Path) -> None:
    """Refuse an archive that would fill the memory, or that was damaged.

    Raises:
        ValueError: Its content is much larger than the file, or differs from its checksums.
        zipfile.BadZipFile: It is no archive, or a part of one.
    """
    with zipfile.ZipFile(path) as archive:
        content, size = sum(r.file_size for r in archive.infolist()), path.stat().st_size
        if content > MOST_EXPANSION * size:
            raise ValueError(
                f'it would unpack to {content:,} bytes, more than {MOST_EXPANSION} times its size '
                f'of {size:,}'
            )
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(
            f'its record {damaged} differs from its checksum; if it was written without checksums, '
            'write it again by torch.save'
        )
