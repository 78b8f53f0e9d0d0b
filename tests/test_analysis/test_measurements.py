"""Timing, memory and steps: what they do, never how long it takes."""

from pathlib import Path

import pytest
import torch
from torch import nn

from mmtoken.analysis import timing
from mmtoken.analysis.memory import peak_mb_on_cpu
from mmtoken.analysis.step import make_images, make_step
from mmtoken.analysis.subject import Subject
from mmtoken.analysis.timing import Spread, ratios, time_in_turn

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


@linux
def test_peak_memory_is_above_the_weights():
    arch = dict(embed_dims=32, depths=(2, 2, 6, 2), num_heads=(1, 2, 4, 8))
    backbone = dict(type='mmtoken.STViTRSwin', arch=arch, out_indices=(0,))
    subject = Subject('', dict(backbone=backbone), 'mmdet', 'backbone')
    # Four images of 64 x 64 tokens; training keeps at least the 128 channels of two MLPs.
    assert 2 * 8 < peak_mb_on_cpu(subject, 4, (256, 256), train=True) < 400
