"""Public data sets are brought to the layout that the configs read."""

import json

import camvid
import ccp
import nuclei
import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from scipy.io import savemat


@pytest.fixture
def originals(tmp_path):
    folder = tmp_path / 'originals'
    folder.mkdir()
    return folder


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array.astype(np.uint8)).save(path)


def prepare(run, tool, originals, out):
    result = run(tool, originals, '--out', out)
    assert result.returncode == 0, result.stderr
    return out


def read(out, split, name):
    image = np.array(Image.open(out / 'images' / split / f'{name}.jpg'))
    labels = np.array(Image.open(out / 'labels' / split / f'{name}.png'))
    assert image.shape == (*labels.shape, 3)
    return labels


LABELS = [label for labels in ccp.CLASSES.values() for label in labels]


def make_ccp(originals, number=1004):
    names = np.empty((1, len(LABELS)), object)
    names[0] = LABELS
    savemat(originals / 'label_list.mat', dict(label_list=names))
    (originals / 'annotations/pixel-level').mkdir(parents=True)
    for i in range(1, number + 1):
        labels = np.full((4, 5), i % len(LABELS), np.uint8)
        savemat(originals / f'annotations/pixel-level/{i:04d}.mat', dict(groundtruth=labels))
        save(originals / f'photos/{i:04d}.jpg', np.zeros((4, 5, 3)))


def test_ccp(run, originals, tmp_path):
    make_ccp(originals)
    out = prepare(run, 'ccp', originals, tmp_path / 'out')
    names = {s: sorted(p.stem for p in out.glob(f'images/{s}/*')) for s in ccp.SPLITS}
    assert {split: len(n) for split, n in names.items()} == ccp.SPLITS
    assert len(set().union(*names.values())) == 904
    assert '0001' in names['train'] and '0005' in names['val'] and '0010' in names['test']
    of_label = LABELS[5 % len(LABELS)]
    expected = next(i for i, ls in enumerate(ccp.CLASSES.values()) if of_label in ls)
    assert (read(out, 'val', '0005') == expected).all()


def test_what_is_not_ccp_is_refused(run, originals, tmp_path):
    make_ccp(originals, number=3)
    result = run('ccp', originals, '--out', tmp_path / 'out')
    assert result.returncode == 1 and not (tmp_path / 'out').exists()
    assert 'expected 1004 files annotations/pixel-level/*.mat, found 3' in result.stderr


def test_camvid(run, originals, tmp_path, monkeypatch):
    monkeypatch.setattr(camvid, 'SPLITS', dict(train=2, val=1, test=1))
    for split, number in camvid.SPLITS.items():
        for i in range(number):
            save(originals / split / f'{split}{i}.png', np.zeros((4, 5, 3)))
            save(originals / f'{split}annot' / f'{split}{i}.png', np.array([[i, 10, 11, 255]] * 4))
    with pytest.raises(AssertionError, match='4 x 5 pixels, its labels have 4 x 4'):
        prepare(run, 'camvid', originals, tmp_path / 'out')
    for split, number in camvid.SPLITS.items():
        for i in range(number):
            save(originals / split / f'{split}{i}.png', np.zeros((4, 4, 3)))
    out = prepare(run, 'camvid', originals, tmp_path / 'out')
    assert read(out, 'train', 'train1').tolist() == [[1, 10, 255, 255]] * 4


def test_nuclei(run, originals, tmp_path):
    for i in range(20):
        mask = np.zeros((12, 16))
        mask[2:5, 3 : 4 + i % 4] = 255
        save(originals / f'id{i}' / 'images' / f'id{i}.png', np.zeros((12, 16, 4)))
        save(originals / f'id{i}' / 'masks' / 'a.png', mask)
        save(originals / f'id{i}' / 'masks' / 'b.png', mask[::-1])
    out = prepare(run, 'nuclei', originals, tmp_path / 'out')
    sets = [COCO(out / f'{split}.json') for split in ('train', 'val')]
    numbers = [len(s.getImgIds()) for s in sets]
    assert sum(numbers) == 20 and min(numbers) > 0
    for s, split in zip(sets, ('train', 'val'), strict=True):
        assert len(s.getAnnIds()) == 2 * len(s.getImgIds())
        for annotation in s.loadAnns(s.getAnnIds()):
            mask = s.annToMask(annotation)
            assert mask.sum() == annotation['area'] > 0
            left, top, width, height = map(int, annotation['bbox'])
            assert mask[top : top + height, left : left + width].all()
        for image in s.loadImgs(s.getImgIds()):
            assert Image.open(out / split / image['file_name']).size == (16, 12)
    assert json.loads((out / 'val.json').read_text())['categories'] == [dict(id=1, name='nucleus')]


@pytest.mark.parametrize('tool', ['ccp', 'camvid', 'nuclei'])
def test_nothing_is_overwritten(run, tool, originals, tmp_path):
    result = run(tool, originals, '--out', tmp_path)
    assert result.returncode == 1 and 'exists already' in result.stderr
    assert run(tool, originals / 'nothing', '--out', tmp_path / 'out').returncode == 1
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('module', [ccp, camvid, nuclei])
def test_help(run, module, capsys):
    result = run(module.__name__, '--help')
    assert result.returncode == 0 and 'example' in result.stdout and 'github.com' in result.stdout
