"""Timing, memory and steps: what they do, never how long it takes."""

from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from torch import nn

from mmtoken.analysis import timing
from mmtoken.analysis.compare import Setting, compare
from mmtoken.analysis.memory import peak_mb_on_cpu
from mmtoken.analysis.step import make_images, make_step
from mmtoken.analysis.subject import Subject, make_subject, twin_of
from mmtoken.analysis.timing import Spread, ratios, time_in_turn
from mmtoken.backbones import MSViT

CPU = torch.device('cpu')
linux = pytest.mark.skipif(
    not Path('/proc/self/clear_refs').exists(), reason='only Linux tells the peak'
)


def test_functions_take_turns_in_alternating_order(monkeypatch):
    monkeypatch.setattr(timing, 'MIN_SECONDS', 0)
    calls, advances = [], []
    steps = {name: (lambda name=name: calls.append(name)) for name in 'abc'}
    times = time_in_turn(steps, 3, CPU, lambda: advances.append(1))
    assert ''.join(calls) == 'abc' + 'abc' + 'cba' + 'abc'
    assert [len(times[name]) for name in 'abc'] == [3, 3, 3]
    assert len(advances) == 3 * (3 + 1)


def test_short_functions_are_repeated(monkeypatch):
    monkeypatch.setattr(timing, '_seconds', lambda step, repeats, device: repeats * 0.03)
    assert time_in_turn(dict(a=None), 2, CPU)['a'] == pytest.approx([120, 120])  # 4 repeats


def test_ratios_are_within_rounds():
    spread = Spread.of(ratios([2, 4, 9], [1, 1, 3]))
    assert spread == (3, 2.5, 3.5, 2, 4)


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 1)
        self.seen = []

    def forward(self, x):
        x = self.conv(x)
        self.seen.append((x.dtype, self.training, torch.is_grad_enabled()))
        return [dict(map=x), (x, None, 'text', x.detach())]


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_steps(dtype):
    images = make_images(2, (8, 8), dtype, CPU)
    assert images.equal(make_images(2, (8, 8), dtype, CPU))
    network = Nested()
    make_step(network, images, train=True)()
    assert network.seen.pop() == (dtype, True, True)
    assert network.conv.weight.dtype == torch.float32 and network.conv.weight.grad is None
    make_step(network, images)()
    assert network.seen.pop() == (dtype, False, False)
    assert network.conv.weight.dtype == dtype


def test_mixed_precision_serves_networks_that_make_float32_tensors():
    class Own(nn.Linear):
        def forward(self, x):
            return super().forward(x.flatten(1) + torch.zeros(1, dtype=torch.float32))

    images = make_images(1, (2, 2), torch.bfloat16, CPU)
    with pytest.raises(RuntimeError):
        make_step(Own(12, 2), images)()
    make_step(Own(12, 2), images, mixed=True)()


def test_training_adds_the_losses_of_routers():
    from mmtoken.runtime.aux_losses import publish

    class Router(nn.Linear):
        gradients = []

        def forward(self, x):
            publish(dict(loss_router=1000 * self.bias.sum(), ratio=self.bias.sum()))
            self.bias.register_hook(self.gradients.append)
            return super().forward(x.flatten(1))

    images = make_images(1, (2, 2), torch.float32, CPU)
    make_step(Router(12, 2), images, train=True)()
    assert Router.gradients[0].min() > 900


def test_runs_are_inside_of_a_context():
    entered = []

    @contextmanager
    def inside():
        entered.append(True)
        yield
        entered.append(False)

    images = make_images(1, (2, 2), torch.float32, CPU)
    for train in (True, False):
        network = Nested()
        network.register_forward_hook(lambda *_: entered.append('ran'))
        step = make_step(network, images, train, inside=inside)
        step()
    assert entered == [True, 'ran', False] * 2


def test_overrides_hold_for_the_sparse_network_alone(monkeypatch):
    monkeypatch.setattr(timing, 'MIN_SECONDS', 0)
    monkeypatch.setattr('mmtoken.analysis.compare.peak_mb_on_cpu', lambda subject, *args: None)
    arch = dict(
        embed_dims=(16, 32), depths=(1, 1), num_heads=(1, 2), mlp_ratios=(2, 2), sr_ratios=(2, 1)
    )
    backbone = dict(type='mmtoken.DGEPVT', arch=arch, out_indices=(1,))
    free = Subject('free', dict(backbone=backbone), 'mmdet', 'backbone')
    sparse = replace(free, name='sparse', routing=dict(query_ratio=0.25))
    setting = Setting((64, 64), rounds=1, train=True)
    measured = compare(dict(sparse=sparse, dense=twin_of(sparse), free=free), setting)
    ratios = {name: m.cost.query_ratio for name, m in measured.items()}
    assert ratios['sparse'] == pytest.approx(0.25, abs=0.02)
    assert ratios['dense'] is None and ratios['free'] > 0.9
    with pytest.raises(ValueError, match='this network has a query_ratio'):
        compare(dict(a=replace(free, routing=dict(coarse_ratio=0.5))), setting)
    with pytest.raises(ValueError, match='dense twin has no routers'):
        compare(dict(a=replace(twin_of(free), routing=dict(query_ratio=0.5))), setting)


MSVIT = dict(
    type='mmtoken.MSViT', arch=dict(
        embed_dims=16, num_layers=1, num_heads=2, feedforward_channels=16
    ),
)  # fmt: skip


@pytest.mark.parametrize(
    'changes, dtype',
    [
        (dict(train_mode='masked'), 'float32'),
        (dict(train_mode='gathered'), 'bfloat16'),
        (dict(out_type='tokens', gate=dict(loss=None)), 'float32'),
    ],
)
def test_training_steps_on_tokens_of_mixed_scale(changes, dtype, monkeypatch):
    monkeypatch.setattr(timing, 'MIN_SECONDS', 0)
    monkeypatch.setattr('mmtoken.analysis.compare.peak_mb_on_cpu', lambda subject, *args: None)
    cfg = Config(dict(model=dict(backbone=MSVIT | changes), default_scope='mmseg'))
    sparse = make_subject(cfg, 'backbone', dict(coarse_ratio=[0.25, 1.0]))
    setting = Setting((64, 64), 2, rounds=1, train=True, dtype=getattr(torch, dtype))
    free = replace(sparse, routing={})
    measured = compare(dict(sparse=sparse, dense=twin_of(sparse), free=free), setting)
    cost, dense = measured['sparse'].cost, measured['dense'].cost
    assert cost.coarse_ratio == (0.25 + 1) / 2
    assert cost.query_ratio == pytest.approx((13 / 16 + 4 / 16) / 2)
    assert dense.query_ratio is None and dense.coarse_ratio is None
    assert cost.macs < dense.macs < measured['free'].cost.macs
    assert measured['free'].cost.coarse_ratio == 0  # untrained


def test_training_publishes_the_loss_of_a_gate():
    network = MSViT(MSVIT['arch'])
    gradients = []
    network.gate_loss.register_full_backward_hook(lambda *_: gradients.append(True))
    make_step(network, make_images(2, (64, 64), torch.float32, CPU), train=True)()
    assert gradients and network.gate.layers[-1].bias.grad is None


@linux
def test_peak_memory_is_above_the_weights():
    arch = dict(embed_dims=32, depths=(2, 2, 6, 2), num_heads=(1, 2, 4, 8))
    backbone = dict(type='mmtoken.STViTRSwin', arch=arch, out_indices=(0,))
    subject = Subject('', dict(backbone=backbone), 'mmdet', 'backbone')
    # Four images of 64 x 64 tokens; training keeps at least the 128 channels of two MLPs.
    assert 2 * 8 < peak_mb_on_cpu(subject, 4, (256, 256), train=True) < 400


@linux
def test_overrides_reach_the_process_of_its_own():
    arch = dict(
        embed_dims=(64, 64), depths=(1, 1), num_heads=(1, 1), mlp_ratios=(8, 2), sr_ratios=(8, 1)
    )
    backbone = dict(type='mmtoken.DGEPVT', arch=arch, out_indices=(0,))
    free = Subject('', dict(backbone=backbone), 'mmdet', 'backbone')
    with pytest.raises(ValueError, match='this network has a query_ratio'):
        peak_mb_on_cpu(replace(free, routing=dict(coarse_ratio=0.5)), 1, (64, 64))
