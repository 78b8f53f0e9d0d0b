"""Prepare Clothing Co-Parsing: street fashion photographs with dense labels."""

import sys
from pathlib import Path

import numpy as np
from preparation import IGNORED, find, run, save_pair
from rich.progress import track
from scipy.io import loadmat

DESCRIPTION = """\
Prepare Clothing Co-Parsing for configs/ccp: 904 photographs of about 550 x 825 pixels, whose 59
labels become 13 classes. Originals: github.com/bearpaw/clothing-co-parsing, with photos/ and
annotations/pixel-level/ and label_list.mat.
"""
EPILOG = """\
writes OUT/images/{train,val,test}/*.jpg and OUT/labels/{train,val,test}/*.png

example:
  python tools/datasets/ccp.py ~/clothing-co-parsing
"""
# Each class, in the order of its number, and the labels that it consists of.
CLASSES = dict(
    background=('null',),
    skin=('skin',),
    hair=('hair',),
    top=(
        'blouse', 'bra', 'cape', 'hoodie', 'intimate', 'shirt', 'sweater', 'sweatshirt', 't-shirt',
        'top',
    ),
    outerwear=('blazer', 'cardigan', 'coat', 'jacket', 'suit', 'vest'),
    dress=('bodysuit', 'dress', 'jumper', 'romper', 'swimwear'),
    bottoms=('jeans', 'leggings', 'panties', 'pants', 'shorts'),
    skirt=('skirt',),
    legwear=('socks', 'stockings', 'tights'),
    footwear=(
        'boots', 'clogs', 'flats', 'heels', 'loafers', 'pumps', 'sandals', 'shoes', 'sneakers',
        'wedges',
    ),
    bag=('bag', 'purse', 'wallet'),
    headwear=('glasses', 'hat', 'sunglasses'),
    accessory=(
        'accessories', 'belt', 'bracelet', 'earrings', 'gloves', 'necklace', 'ring', 'scarf', 'tie',
        'watch',
    ),
)  # fmt: skip
LABELED = 1004  # photographs
SPLITS = dict(train=600, val=154, test=150)


def prepare(originals: Path, folder: Path) -> None:
    """Read the originals, write the data set.

    Raises:
        FileNotFoundError: Something is missing, or is not what it should be.
    """
    table = class_table(originals / 'label_list.mat')
    files = find(originals, 'annotations/pixel-level/*.mat', LABELED)
    for split, indices in split_indices().items():
        for file in track([files[i] for i in indices], split):
            labels = table[loadmat(file)['groundtruth']]
            save_pair(folder, split, file.stem, originals / 'photos' / f'{file.stem}.jpg', labels)


def split_indices() -> dict[str, list[int]]:
    """Indices of the photographs with labels, by name, in each split.

    Training and validation are drawn; the test set is the beginning of what is left.
    """
    drawn = np.random.RandomState(0).permutation(LABELED)
    train, val, rest = np.split(drawn, np.cumsum([SPLITS['train'], SPLITS['val']]))
    splits = dict(train=train, val=val, test=np.sort(rest)[: SPLITS['test']])
    return {name: sorted(indices.tolist()) for name, indices in splits.items()}


def class_table(file: Path) -> np.ndarray:
    """The class of each label, ``(256,)`` uint8; :data:`IGNORED` for numbers that are no label."""
    names = [str(name.item()) for name in loadmat(file)['label_list'].flatten()]
    class_of = {label: i for i, labels in enumerate(CLASSES.values()) for label in labels}
    if unknown := sorted(set(names) - set(class_of)):
        raise FileNotFoundError(f'{file} has labels that this script does not know: {unknown}')
    table = np.full(256, IGNORED, np.uint8)
    table[: len(names)] = [class_of[name] for name in names]
    return table


def main() -> int:
    """Return 0, or 1 if nothing was made."""
    return run(prepare, DESCRIPTION, EPILOG, 'data/ccp')


if __name__ == '__main__':
    sys.exit(main())
