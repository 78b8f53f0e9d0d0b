"""Two processes through `dist_train.sh` are one; a training that is killed goes on as it was."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from end_to_end import CONFIGS, ONE_PROCESS, ROOT, TRAIN, run, scores

pytestmark = pytest.mark.e2e

BASES = CONFIGS / '_base_'
# Group norm, and no augmentation: processes have batches and random numbers of their own.
CONFIG = f"""
_base_ = [
    '{BASES}/models/shapes_semantic-fpn.py',
    '{BASES}/datasets/shapes_semantic.py',
    '{BASES}/schedules/shapes_semantic_500i.py',
    __import__('mmtoken') and 'mmseg::_base_/default_runtime.py',
]
model = dict(
    backbone=dict(
        _delete_=True, type='mmtoken.MSViT', coarse_size=16, fine_size=8, img_size=128,
        arch=dict(embed_dims=32, num_layers=2, num_heads=2, feedforward_channels=64),
        gate=dict(
            input='patches', fine_ratio=0.5, label_loss=dict(type='mmtoken.LabelPurityLoss')
        ),
    ),
    neck=None,
    decode_head=dict(
        _delete_=True, type='FCNHead', in_channels=32, in_index=0, channels=8, num_convs=1,
        num_classes=9, dropout_ratio=0.0, norm_cfg=dict(type='GN', num_groups=2),
    ),
)
pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', reduce_zero_label=True),
    dict(type='Resize', scale=(128, 128), keep_ratio=False),
    dict(type='PackSegInputs'),
]
train_dataloader = dict(batch_size=4, dataset=dict(pipeline=pipeline))
train_cfg = dict(max_iters=4, val_interval=4)
param_scheduler = []
optim_wrapper = dict(optimizer=dict(_delete_=True, type='SGD', lr=0.1, weight_decay=0.01))
default_hooks = dict(
    checkpoint=dict(interval=2),
    token_losses=dict(type='mmtoken.TokenLossHook'),
    random_states=dict(type='mmtoken.RandomStateHook'),
)
"""


def environment():
    path = f'{Path(sys.executable).parent}:{os.environ["PATH"]}'
    return {**os.environ, 'PATH': path, 'CUDA_VISIBLE_DEVICES': '', 'PORT': str(free_port())}


def free_port():
    with socket.socket() as found:
        found.bind(('127.0.0.1', 0))
        return found.getsockname()[1]


def weights(folder):
    return torch.load(folder / 'iter_4.pth', weights_only=False)['state_dict']


@pytest.fixture(scope='module')
def one_process(workspace):
    (workspace / 'processes.py').write_text(CONFIG)
    folder = workspace / 'work_dirs' / 'one_process'
    output = run(workspace, TRAIN, 'processes.py', '--work-dir', folder, options=ONE_PROCESS)
    return folder, scores(output, 'mIoU')


def test_two_processes_are_one(workspace, one_process):
    """Each with half of the batch, and half of the images that are tested."""
    folder = workspace / 'work_dirs' / 'two_processes'
    options = [*ONE_PROCESS, 'train_dataloader.batch_size=2']
    result = subprocess.run(
        [
            str(ROOT / 'tools' / 'dist_train.sh'), 'processes.py', '2', '--work-dir', str(folder),
            '--cfg-options', *options,
        ],
        cwd=workspace, env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-4000:]
    assert 'PyTorch sees no GPU, 2 processes share the CPU' in result.stderr
    torch.testing.assert_close(weights(folder), weights(one_process[0]), rtol=1e-4, atol=1e-5)
    [[got], [wanted]] = scores(result.stdout + result.stderr, 'mIoU')[-1:], one_process[1]
    assert got == pytest.approx(wanted, abs=0.2)


def test_a_killed_training_goes_on(workspace, one_process):
    folder = workspace / 'work_dirs' / 'killed'
    command = [
        sys.executable, str(TRAIN), 'processes.py', '--work-dir', str(folder),
        '--cfg-options', *ONE_PROCESS,
    ]  # fmt: skip
    process = subprocess.Popen(
        command, cwd=workspace, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    record = folder / 'last_checkpoint'
    while not (record.exists() and record.read_text()):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    run(workspace, TRAIN, 'processes.py', '--work-dir', folder, '--resume', options=ONE_PROCESS)
    for name, tensor in weights(one_process[0]).items():
        assert torch.equal(weights(folder)[name], tensor), name
