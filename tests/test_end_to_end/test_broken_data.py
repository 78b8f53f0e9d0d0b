"""Training on broken files ends with the name of the file, and what was trained is kept."""

import shutil

import cv2
import numpy as np
import pytest
import torch
from end_to_end import CONFIGS, FROM_SCRATCH, ONE_PROCESS, TRAIN, run_tool

pytestmark = pytest.mark.e2e

SEGMENTER = CONFIGS / 'shapes' / 'fpn_dge-pvt-nano_1xb16-300i_shapes-128x128.py'
DETECTOR = CONFIGS / 'shapes' / 'mask-rcnn_dge-pvt-nano_fpn_1xb8-3e_shapes.py'
# One image a step, in the order of their names, and a checkpoint behind each step
IN_ORDER = [
    *ONE_PROCESS, FROM_SCRATCH, 'train_dataloader.batch_size=1',
    'train_dataloader.sampler.shuffle=False', 'train_cfg.max_iters=4', 'train_cfg.val_interval=4',
    'default_hooks.checkpoint.interval=1', 'default_hooks.checkpoint.max_keep_ckpts=1',
    'default_hooks.label_range.type=mmtoken.LabelRangeHook',
]  # fmt: skip


@pytest.fixture
def folder(workspace, tmp_path):
    shutil.copytree(workspace / 'data' / 'shapes', tmp_path / 'data' / 'shapes')
    return tmp_path


def cut_off(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def write_label(file):
    labels = cv2.imread(str(file), cv2.IMREAD_UNCHANGED)
    labels[40:60, 40:60] = 200
    cv2.imwrite(str(file), labels)


@pytest.mark.parametrize(
    'kind, spoil, message',
    [
        ('annotations', lambda file: file.unlink(), 'No such file or directory'),
        ('images', cut_off, 'failed to load image'),
        ('annotations', write_label, r'has the labels [199] (as they are after the pipeline)'),
    ],
    ids=['missing', 'cut off', 'label'],
)
def test_segmentation(kind, spoil, message, folder):
    root = folder / 'data' / 'shapes' / 'ade' / 'ADEChallengeData2016' / kind / 'training'
    file = sorted(root.iterdir())[2]
    spoil(file)
    work_dir = folder / 'work_dir'
    status, output = run_tool(folder, TRAIN, SEGMENTER, '--work-dir', work_dir, options=IN_ORDER)
    last = output.strip().splitlines()[-1]
    assert status != 0 and message in last and file.name in last
    kept = torch.load(work_dir / 'iter_2.pth', weights_only=False)
    assert all(np.isfinite(tensor.numpy()).all() for tensor in kept['state_dict'].values())
    assert (work_dir / 'last_checkpoint').read_text().endswith('iter_2.pth')


def test_annotations_that_are_no_json(folder):
    files = (folder / 'data' / 'shapes' / 'coco' / 'annotations').glob('*train*.json')
    cut_off(file := next(files))
    status, output = run_tool(folder, TRAIN, DETECTOR, options=[*ONE_PROCESS, FROM_SCRATCH])
    last = output.strip().splitlines()[-1]
    assert status != 0 and last.startswith('train.py: ') and file.name in last
