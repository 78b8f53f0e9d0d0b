"""Write the data set: scenes drawn in parallel, in the layouts of COCO and of ADE20K."""

import json
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from .classes import CLASS_IDS
from .coco import annotate, make_document
from .difficulty import InstanceFacts, measure_difficulty, measure_instances
from .output import GENERATOR, SUMMARY_NAME, fresh_folder
from .preview import draw_contact_sheet
from .scene import draw_scene

MAX_IMAGES = 500_000
MIN_SIDE = 64
JPEG_QUALITY = 92


@dataclass(frozen=True)
class Split:
    """Folders of a split in both layouts, and its seeds and ids.

    Attributes:
        seed: Differs between splits, so that their scenes do.
        first_image_id: COCO id of its first image; the ids of all splits together are unique,
            and do not depend on how many images the others have.
    """

    coco: str
    ade: str
    ade_prefix: str
    seed: int
    first_image_id: int


TRAIN = Split('train2017', 'training', 'ADE_train', seed=0, first_image_id=1)
VAL = Split('val2017', 'validation', 'ADE_val', seed=1, first_image_id=MAX_IMAGES + 1)


@dataclass(frozen=True)
class SceneRecord:
    """Annotations of a scene whose picture and mask are written."""

    image: dict[str, Any]
    annotations: list[dict[str, Any]]
    facts: list[InstanceFacts]


def make_dataset(
    out: Path | str,
    num_train: int = 600,
    num_val: int = 150,
    size: tuple[int, int] = (128, 176),
    seed: int = 0,
    workers: int = 1,
    force: bool = False,
    show_progress: bool = False,
) -> dict[str, Any]:
    """Write the data set; the same arguments give the same bytes, whatever ``workers`` is.

    A scene depends only on ``size``, ``seed``, its split and its number, so a smaller data set is
    the beginning of a larger one. ``out`` exists only once all of it is written.

    Args:
        out: Folder to make.
        num_train: Number of training images.
        num_val: Number of validation images.
        size: Height and width in pixels; about half the images have them exchanged.
        seed: Of the data set.
        workers: Number of processes.
        force: Replace ``out`` if it is a data set made by this function.
        show_progress: Show a progress bar on stderr.

    Returns:
        The content of ``shapes.json``: arguments, counts and difficulty.

    Raises:
        ValueError: If an argument is out of range.
        FileExistsError: If ``out`` is in use and must not be replaced.
    """
    check_arguments(num_train, num_val, size, seed, workers)
    with fresh_folder(Path(out), force) as root:
        for split in (TRAIN, VAL):
            for folder in (*_picture_folders(root, split), _mask_folder(root, split)):
                folder.mkdir(parents=True)
        tasks = [(TRAIN, k) for k in range(num_train)] + [(VAL, k) for k in range(num_val)]
        records = list(
            track(
                _map(partial(_write_scene, root, size, seed), tasks, workers),
                description='Drawing scenes',
                total=len(tasks),
                console=Console(stderr=True),
                disable=not show_progress,
            )
        )
        train, val = records[:num_train], records[num_train:]
        _write_instances(root, TRAIN, train)
        _write_instances(root, VAL, val)
        _write_image(root / 'preview.png', _draw_preview(num_train, size, seed))
        summary = {
            'generator': GENERATOR,
            'arguments': {
                'train': num_train,
                'val': num_val,
                'size': list(size),
                'seed': seed,
            },
            'class_ids': CLASS_IDS,
            'instances': {'train': _count_instances(train), 'val': _count_instances(val)},
            'difficulty': measure_difficulty(_all_facts(train), _all_facts(val)),
        }
        (root / SUMMARY_NAME).write_text(json.dumps(summary, indent=2) + '\n')
    return summary


def check_arguments(
    num_train: int, num_val: int, size: tuple[int, int], seed: int, workers: int
) -> None:
    """Raise a ValueError that says what is allowed if an argument is out of range."""
    for name, value in (('train', num_train), ('val', num_val)):
        if not 1 <= value <= MAX_IMAGES:
            raise ValueError(f'{name} is {value}; it has to be from 1 to {MAX_IMAGES} images')
    if min(size) < MIN_SIDE:
        raise ValueError(
            f'size is {size[0]} x {size[1]}; both sides have to be at least {MIN_SIDE} pixels'
        )
    if seed < 0:
        raise ValueError(f'seed is {seed}; it has to be 0 or more')
    if workers < 1:
        raise ValueError(f'workers is {workers}; it has to be at least 1')


def _map(function: Callable, tasks: list, workers: int) -> Iterator:
    """Apply a function to all tasks in order, in this process if one worker is asked for."""
    if workers == 1:
        yield from map(function, tasks)
        return
    # A fresh interpreter per worker: OpenCV's threads do not survive a fork.
    with ProcessPoolExecutor(workers, get_context('spawn'), _start_worker) as pool:
        yield from pool.map(function, tasks, chunksize=8)


def _start_worker() -> None:
    """Use one thread, and let the parent handle Ctrl-C."""
    cv2.setNumThreads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _write_scene(
    root: Path, size: tuple[int, int], seed: int, task: tuple[Split, int]
) -> SceneRecord:
    split, index = task
    scene = draw_scene(size, (seed, split.seed, index))
    image_id = split.first_image_id + index
    coco_name = f'{image_id:012d}.jpg'
    ade_stem = f'{split.ade_prefix}_{index + 1:08d}'
    coco_folder, ade_folder = _picture_folders(root, split)
    _write_image(coco_folder / coco_name, scene.image)
    _write_image(ade_folder / f'{ade_stem}.jpg', scene.image)
    _write_image(_mask_folder(root, split) / f'{ade_stem}.png', scene.semantic)
    height, width = scene.semantic.shape
    return SceneRecord(
        image={
            'id': image_id,
            'file_name': coco_name,
            'height': height,
            'width': width,
            'license': 1,
        },
        annotations=[
            annotate(instance, 100 * image_id + k, image_id)
            for k, instance in enumerate(scene.instances)
        ],
        facts=measure_instances(scene),
    )


def _picture_folders(root: Path, split: Split) -> tuple[Path, Path]:
    return root / 'coco' / split.coco, root / 'ade/ADEChallengeData2016/images' / split.ade


def _mask_folder(root: Path, split: Split) -> Path:
    return root / 'ade/ADEChallengeData2016/annotations' / split.ade


def _write_instances(root: Path, split: Split, records: list[SceneRecord]) -> None:
    folder = root / 'coco/annotations'
    folder.mkdir(exist_ok=True)
    document = make_document(
        images=[record.image for record in records],
        annotations=[annotation for record in records for annotation in record.annotations],
    )
    (folder / f'instances_{split.coco}.json').write_text(json.dumps(document))


def _write_image(path: Path, image: NDArray) -> None:
    """Write an RGB or a single-channel uint8 picture in the format of its suffix."""
    if image.ndim == 3:
        image = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    _, data = cv2.imencode(path.suffix, image, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    path.write_bytes(data.tobytes())


def _draw_preview(num_train: int, size: tuple[int, int], seed: int) -> NDArray:
    """Draw a sheet of the first training scenes, up to six of each orientation."""
    scenes = [draw_scene(size, (seed, TRAIN.seed, k)) for k in range(min(num_train, 24))]
    wide = [scene for scene in scenes if np.less(*scene.semantic.shape)]
    tall = [scene for scene in scenes if not np.less(*scene.semantic.shape)]
    return draw_contact_sheet(wide[:6] + tall[:6])


def _count_instances(records: list[SceneRecord]) -> dict[str, int]:
    annotations = [annotation for record in records for annotation in record.annotations]
    counts = Counter(a['category_id'] for a in annotations if not a['iscrowd'])
    crowds = sum(a['iscrowd'] for a in annotations)
    return {**{name: counts[class_id] for name, class_id in CLASS_IDS.items()}, 'crowd': crowds}


def _all_facts(records: list[SceneRecord]) -> list[InstanceFacts]:
    return [facts for record in records for facts in record.facts]
