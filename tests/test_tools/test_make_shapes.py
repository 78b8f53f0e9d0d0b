"""The drawn data set: layouts, labels, difficulty, and how it is written."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools import mask as rle_tools
from pycocotools.coco import COCO
from shapes import CLASS_IDS, UNLABELLED_ID, WALL_ID, make_dataset
from shapes import build as build_module
from shapes.coco import to_polygons, to_run_lengths
from shapes.difficulty import MAX_COLOUR_ACCURACY, MIN_OVERLAPPED_SHARE, MIN_SMALL_SHARE
from shapes.scene import draw_scene

TOOLS = Path(__file__).parents[2] / 'tools' / 'datasets'

NUM_TRAIN, NUM_VAL = 200, 60
SPLITS = [
    ('train2017', 'training', 'ADE_train', NUM_TRAIN),
    ('val2017', 'validation', 'ADE_val', NUM_VAL),
]
TINY = {'num_train': 3, 'num_val': 2, 'size': (64, 96)}


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """Folder of a representative part of the default data set."""
    out = tmp_path_factory.mktemp('data') / 'shapes'
    make_dataset(out, NUM_TRAIN, NUM_VAL, workers=2)
    return out


@pytest.fixture(scope='module')
def summary(data):
    return json.loads((data / 'shapes.json').read_text())


def load_coco(data, split):
    return COCO(data / 'coco' / 'annotations' / f'instances_{split}.json')


def load_mask(data, folder, stem):
    path = data / 'ade/ADEChallengeData2016/annotations' / folder / f'{stem}.png'
    return cv2.imread(str(path), cv2.IMREAD_UNCHANGED)


def hash_files(folder):
    return {
        path.relative_to(folder): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob('*')
        if path.is_file()
    }


def run_cli(*args, cwd):
    return subprocess.run(
        [sys.executable, str(TOOLS / 'make_shapes.py'), *map(str, args)],
        cwd=cwd,
        capture_output=True,
        text=True,
    )


def test_same_bytes_whatever_the_workers(tmp_path):
    for name, workers in (('one', 1), ('again', 1), ('two', 2)):
        make_dataset(tmp_path / name, **TINY, workers=workers)
    expected = hash_files(tmp_path / 'one')
    assert hash_files(tmp_path / 'again') == expected
    assert hash_files(tmp_path / 'two') == expected


def test_smaller_set_is_beginning_of_larger(data, tmp_path):
    make_dataset(tmp_path / 'few', num_train=2, num_val=2)
    few, many = hash_files(tmp_path / 'few'), hash_files(data)
    pictures = [path for path in few if path.parent.name != 'annotations' and len(path.parts) > 1]
    assert len(pictures) == 4 * 3
    assert all(few[path] == many[path] for path in pictures)


def test_larger_scenes_hold_the_same_objects():
    """And more: what found no room in the smaller scene."""
    found = {}
    for size in ((128, 176), (256, 352)):
        scenes = [draw_scene(size, (0, 0, k)) for k in range(20)]
        found[size] = [
            {(i.name, np.count_nonzero(i.silhouette)) for i in scene.instances} for scene in scenes
        ]
        assert all(set(scene.semantic.shape) == set(size) for scene in scenes)
    few, many = found.values()
    kept = [len(a & b) for a, b in zip(few, many, strict=True)]
    assert sum(kept) > 0.95 * sum(map(len, few))
    assert sum(map(len, many)) > 1.2 * sum(map(len, few))


def test_seed_changes_the_scenes(tmp_path):
    for seed in (0, 1):
        make_dataset(tmp_path / str(seed), **TINY, seed=seed)
    name = Path('coco/train2017/000000000001.jpg')
    assert hash_files(tmp_path / '0')[name] != hash_files(tmp_path / '1')[name]


@pytest.mark.parametrize('coco_folder, ade_folder, prefix, count', SPLITS)
def test_layouts_hold_the_same_pictures(data, coco_folder, ade_folder, prefix, count):
    coco = load_coco(data, coco_folder)
    ade = data / 'ade/ADEChallengeData2016'
    assert len(coco.imgs) == len(list((data / 'coco' / coco_folder).iterdir())) == count
    assert len(list((ade / 'annotations' / ade_folder).iterdir())) == count
    orientations = []
    for k, image in enumerate(coco.imgs.values(), start=1):
        assert image['file_name'] == f'{image["id"]:012d}.jpg'
        picture = data / 'coco' / coco_folder / image['file_name']
        twin = ade / 'images' / ade_folder / f'{prefix}_{k:08d}.jpg'
        assert picture.read_bytes() == twin.read_bytes()
        shape = cv2.imread(str(picture)).shape
        assert shape == (image['height'], image['width'], 3)
        assert load_mask(data, ade_folder, twin.stem).shape == shape[:2]
        orientations.append(shape[:2])
    assert set(orientations) == {(128, 176), (176, 128)}
    assert 0.3 < orientations.count((128, 176)) / count < 0.7


def test_ids_are_unique_over_splits(data):
    train, val = load_coco(data, 'train2017'), load_coco(data, 'val2017')
    assert not train.imgs.keys() & val.imgs.keys()
    assert not train.anns.keys() & val.anns.keys()
    assert {c['name']: c['id'] for c in train.cats.values()} == CLASS_IDS


@pytest.mark.parametrize('coco_folder, ade_folder, prefix, count', SPLITS)
def test_annotations_agree_with_their_masks(data, coco_folder, ade_folder, prefix, count):
    coco = load_coco(data, coco_folder)
    crowds = 0
    for k, image_id in enumerate(coco.imgs, start=1):
        semantic = load_mask(data, ade_folder, f'{prefix}_{k:08d}')
        covered = np.zeros(semantic.shape, int)
        for annotation in coco.imgToAnns[image_id]:
            rle = coco.annToRLE(annotation)
            mask = rle_tools.decode(rle).astype(bool)
            covered += mask
            assert annotation['area'] == mask.sum() >= 10
            assert annotation['bbox'] == rle_tools.toBbox(rle).tolist()
            labelled = mask & (semantic != UNLABELLED_ID)
            own = (semantic == annotation['category_id'])[labelled].mean()
            assert own > (0.9 if annotation['area'] > 100 else 0.7)
            crowds += annotation['iscrowd']
            assert annotation['iscrowd'] == isinstance(annotation['segmentation'], dict)
        objects = (semantic != WALL_ID) & (semantic != UNLABELLED_ID)
        assert (objects & (covered > 0)).sum() >= 0.9 * objects.sum()
    assert 0.01 < crowds / count < 0.15


@pytest.mark.parametrize('coco_folder, ade_folder, prefix, count', SPLITS)
def test_semantic_masks_label_all_but_specks(data, coco_folder, ade_folder, prefix, count):
    pixels = np.zeros(256, int)
    for k in range(1, count + 1):
        semantic = load_mask(data, ade_folder, f'{prefix}_{k:08d}')
        assert semantic.dtype == np.uint8
        assert semantic.ndim == 2
        histogram = np.bincount(semantic.ravel(), minlength=256)
        assert 0 < histogram[UNLABELLED_ID] <= 16
        pixels += histogram
    assert set(np.flatnonzero(pixels)) == {UNLABELLED_ID, WALL_ID, *CLASS_IDS.values()}
    assert pixels.argmax() == WALL_ID


def test_difficulty_is_held(summary):
    difficulty = summary['difficulty']
    assert difficulty['small'] >= MIN_SMALL_SHARE
    assert difficulty['overlapped'] >= MIN_OVERLAPPED_SHARE
    assert difficulty['colour_accuracy'] < MAX_COLOUR_ACCURACY
    assert difficulty['large'] >= 0.45


def test_small_share_can_be_counted_from_the_annotations(data, summary):
    areas = [
        annotation['area']
        for split in ('train2017', 'val2017')
        for annotation in load_coco(data, split).anns.values()
        if not annotation['iscrowd']
    ]
    small = np.mean(np.array(areas) < 16**2)
    assert small == pytest.approx(summary['difficulty']['small'], abs=0.03)


def test_classes_are_balanced(summary):
    counts = [summary['instances']['train'][name] for name in CLASS_IDS]
    assert min(counts) > 0.6 * max(counts)


def test_polygons_of_a_mask_with_holes_and_parts():
    mask = np.zeros((40, 50), bool)
    mask[5:30, 5:30] = True
    mask[8:14, 10:14] = mask[18:25, 16:22] = False
    mask[34:38, 40:48] = True
    rle = rle_tools.merge(rle_tools.frPyObjects(to_polygons(mask), *mask.shape))
    np.testing.assert_array_equal(rle_tools.decode(rle).astype(bool), mask)


@pytest.mark.parametrize('corner', [False, True])
def test_run_lengths_decode_to_the_mask(corner):
    mask = np.random.default_rng(0).random((7, 9)) < 0.4
    mask[0, 0] = mask[-1, -1] = corner
    rle = rle_tools.frPyObjects(to_run_lengths(mask), *mask.shape)
    np.testing.assert_array_equal(rle_tools.decode(rle).astype(bool), mask)


def test_force_replaces_own_folder_only(tmp_path):
    out = tmp_path / 'shapes'
    make_dataset(out, **TINY)
    before = hash_files(out)
    with pytest.raises(FileExistsError, match='--force'):
        make_dataset(out, **TINY, seed=1)
    assert hash_files(out) == before
    make_dataset(out, **TINY, seed=1, force=True)
    assert hash_files(out) != before

    (out / 'shapes.json').write_text('{"generator": "something else"}')
    with pytest.raises(FileExistsError, match='not made by this tool'):
        make_dataset(out, **TINY, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ['shapes']


def test_empty_folder_is_filled_and_file_is_refused(tmp_path):
    (tmp_path / 'empty').mkdir()
    make_dataset(tmp_path / 'empty', **TINY)
    (tmp_path / 'file').touch()
    with pytest.raises(FileExistsError, match='is a file'):
        make_dataset(tmp_path / 'file', **TINY, force=True)


def test_failure_leaves_the_old_data(tmp_path, monkeypatch):
    out = tmp_path / 'shapes'
    make_dataset(out, **TINY)
    before = hash_files(out)

    def fail(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(build_module, 'draw_contact_sheet', fail)
    with pytest.raises(KeyboardInterrupt):
        make_dataset(out, **TINY, seed=1, force=True)
    assert hash_files(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ['shapes']


def test_cli_makes_then_refuses_in_one_line(tmp_path):
    args = ['--out', 'shapes', '--train', 2, '--val', 1, '--size', 64, 80, '--workers', 1]
    made = run_cli(*args, cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    assert 'Difficulty' in made.stdout
    assert (tmp_path / 'shapes' / 'preview.png').is_file()
    refused = run_cli(*args, cwd=tmp_path)
    assert refused.returncode == 1
    assert refused.stderr.count('\n') == 1
    assert str(tmp_path / 'shapes') in refused.stderr
    assert '--force' in refused.stderr


def test_cli_help_teaches(tmp_path):
    shown = run_cli('--help', cwd=tmp_path)
    assert shown.returncode == 0
    for text in ('ADE20K', 'default: 600', 'examples:', '--force'):
        assert text in shown.stdout


@pytest.mark.parametrize(
    'args, message',
    [
        (['--train', 0], 'train is 0; it has to be from 1 to'),
        (['--val', -1], 'val is -1; it has to be from 1 to'),
        (['--size', 128, 63], 'at least 64 pixels'),
        (['--seed', -1], '0 or more'),
        (['--workers', 0], 'at least 1'),
    ],
)
def test_cli_says_what_is_allowed(tmp_path, args, message):
    refused = run_cli(*args, cwd=tmp_path)
    assert refused.returncode == 2
    assert message in refused.stderr
    assert not any(tmp_path.iterdir())
