"""What the scripts that prepare public data sets share."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from mmtoken.files import replacing

JPEG_QUALITY = 95
IGNORED = 255  # a pixel without a label


def run(prepare: Callable[[Path, Path], None], description: str, epilog: str, out: str) -> int:
    """Parse the command line, and prepare a data set in one step.

    Args:
        prepare: Reads the originals in its first argument and writes to its second.
        description, epilog: Of ``--help``.
        out: Default of ``--out``.

    Returns:
        0, or 1 if nothing was made.
    """
    parser = argparse.ArgumentParser(
        description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('originals', type=Path, help='folder with the originals, as unpacked')
    parser.add_argument('--out', type=Path, default=Path(out), help='default: %(default)s')
    args = parser.parse_args()
    if args.out.exists():
        print(f'{args.out} exists already; remove it first', file=sys.stderr)
        return 1
    try:
        with replacing(args.out) as folder:
            folder.mkdir()
            prepare(args.originals, folder)
    except OSError as error:
        print(error, file=sys.stderr)
        return 1
    print(f'{args.out} is ready')
    return 0


def find(folder: Path, pattern: str, number: int | None = None) -> list[Path]:
    """Files of the originals, by name.

    Raises:
        FileNotFoundError: None, or another number of them.
    """
    files = sorted(folder.glob(pattern))
    if not files or number not in (None, len(files)):
        wanted = 'some' if number is None else number
        raise FileNotFoundError(f'{folder}: expected {wanted} files {pattern}, found {len(files)}')
    return files


def save_pair(folder: Path, split: str, name: str, image: Path, labels: np.ndarray) -> None:
    """Write an image and its labels, ``(H, W)`` uint8, in the layout that the configs read.

    An image that is a JPEG is copied as it is.

    Raises:
        FileNotFoundError: The labels are of another size than the image.
    """
    picture = Image.open(image)
    if picture.size != labels.shape[::-1]:
        raise FileNotFoundError(
            f'{image} has {picture.size[1]} x {picture.size[0]} pixels, its labels have '
            f'{labels.shape[0]} x {labels.shape[1]}'
        )
    target = folder / 'images' / split / f'{name}.jpg'
    for path in (target, folder / 'labels' / split / f'{name}.png'):
        path.parent.mkdir(parents=True, exist_ok=True)
    if picture.format == 'JPEG':
        target.write_bytes(image.read_bytes())
    else:
        picture.convert('RGB').save(target, quality=JPEG_QUALITY)
    Image.fromarray(labels).save(folder / 'labels' / split / f'{name}.png')
