"""A whole segmentor in two processes is one in a single process, token losses included."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import OptimWrapper
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import PixelData
from mmengine.utils import import_modules_from_strings

from mmtoken.engine import token_loss_hook
from mmtoken.layers.common import routing

SIDE, IMAGES, CLASSES = 64, 4, 5
# Group norm: batch norm would see other images in each process.
NORM = dict(type='GN', num_groups=2)
MODEL = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(type='SegDataPreProcessor', size=(SIDE, SIDE)),
    backbone=dict(
        type='mmtoken.DGEPVT',
        arch=dict(
            embed_dims=(8, 16), depths=(1, 2), num_heads=(1, 2), mlp_ratios=(2, 2), sr_ratios=(8, 4)
        ),
        out_indices=(0, 1),
        drop_path_rate=0.0,
        budget=dict(type='mmtoken.BudgetLoss', loss_weight=100.0),
    ),
    decode_head=dict(
        type='FPNHead',
        in_channels=[8, 16],
        in_index=[0, 1],
        feature_strides=[4, 8],
        channels=8,
        dropout_ratio=0.0,
        num_classes=CLASSES,
        norm_cfg=NORM,
    ),
    train_cfg={},
    test_cfg=dict(mode='whole'),
)


def make_model():
    import_modules_from_strings(['mmseg.models'])
    init_default_scope('mmseg')
    torch.manual_seed(0)
    model = MODELS.build(MODEL)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if 'router' in name:  # so that regions differ
                parameter.normal_(std=2)
    return model.train()


def train_step(model, images):
    """One step with the images' own share of a batch: losses, and gradients."""
    from mmseg.structures import SegDataSample

    generator = torch.Generator().manual_seed(1)
    inputs = torch.rand(IMAGES, 3, SIDE, SIDE, generator=generator) * 4 - 2
    labels = torch.randint(CLASSES, (IMAGES, 1, SIDE, SIDE), generator=generator)
    samples = [SegDataSample(gt_sem_seg=PixelData(data=labels[i])) for i in images]
    data = dict(inputs=[inputs[i] for i in images], data_samples=samples)
    # Without a step, so that gradients can be looked at.
    optim_wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.0))
    optim_wrapper.zero_grad = lambda: None
    logged = model.train_step(data, optim_wrapper)
    parameters = getattr(model, 'module', model).named_parameters()
    return (
        {name: value.item() for name, value in logged.items()},
        {name: p.grad.double().numpy() for name, p in parameters if p.grad is not None},
    )


@pytest.fixture
def without_noise(monkeypatch):
    monkeypatch.setattr(routing, 'gumbel_noise', torch.zeros_like)


def hook_up(model):
    """As TokenLossHook does before training."""
    from types import SimpleNamespace

    token_loss_hook.TokenLossHook().before_train(SimpleNamespace(model=model))


def work(folder, rank):
    """One of two processes."""
    routing.gumbel_noise = torch.zeros_like
    dist.init_process_group('gloo', init_method=f'file://{folder}/init', rank=rank, world_size=2)
    model = MMDistributedDataParallel(make_model(), find_unused_parameters=False)
    hook_up(model)
    losses, gradients = train_step(model, range(rank, IMAGES, 2))
    np.savez(f'{folder}/{rank}.npz', **losses, **gradients)
    dist.destroy_process_group()


def test_two_processes_are_one(tmp_path, without_noise):
    commands = [[sys.executable, __file__, tmp_path, str(rank)] for rank in (0, 1)]
    processes = [subprocess.Popen(command) for command in commands]
    model = make_model()
    hook_up(model)
    losses, gradients = train_step(model, range(IMAGES))
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    parts = [np.load(tmp_path / f'{rank}.npz') for rank in (0, 1)]
    assert losses['loss_budget'] > 0 and 0 < losses['query_ratio_s0'] < 1
    for part in parts:
        assert part['loss_budget'] == pytest.approx(losses['loss_budget'], rel=1e-5)
        assert part['budget_ratio'] == pytest.approx(losses['budget_ratio'], rel=1e-6)
        for name, gradient in gradients.items():
            np.testing.assert_allclose(part[name], gradient, rtol=1e-4, atol=1e-5, err_msg=name)
    mean = np.mean([part['decode.loss_ce'] for part in parts])
    assert mean == pytest.approx(losses['decode.loss_ce'], rel=1e-5)
    routers = [name for name in gradients if 'router' in name]
    assert routers and all(abs(gradients[name]).max() > 1e-3 for name in routers)


if __name__ == '__main__':
    work(Path(sys.argv[1]), int(sys.argv[2]))
