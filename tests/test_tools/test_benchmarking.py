"""Steps, timing and memory: what is run, not how long it takes."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from benchmarking import measure as measuring
from benchmarking import memory, parts
from benchmarking.measure import count_progress, measure
from benchmarking.parts import REST, time_parts
from benchmarking.profile import KINDS, OTHER, profile_step
from benchmarking.step import Setting, make_images, make_step
from benchmarking.targets import BenchmarkTarget, build_target, dense_target
from helpers import TORCH_2_1
from mmengine.config import Config
from torch import nn

from mmtoken.analysis import timing
from mmtoken.analysis.spread import spread
from mmtoken.analysis.timing import ratios, time_in_turn
from mmtoken.backbones import MSViT
from mmtoken.runtime.aux_losses import publish

CPU = torch.device('cpu')
DGE = dict(
    type='mmtoken.DGEPVT', out_indices=(1,), arch=dict(
        embed_dims=(16, 32), depths=(1, 1), num_heads=(1, 2), mlp_ratios=(2, 2), sr_ratios=(2, 1)
    ),
)  # fmt: skip
MSVIT = dict(
    type='mmtoken.MSViT', arch=dict(
        embed_dims=16, num_layers=1, num_heads=2, feedforward_channels=16
    ),
)  # fmt: skip
SMALL = Setting((8, 8), 2)


def make_target(backbone, **kwargs):
    return BenchmarkTarget('target', dict(backbone=backbone), 'mmdet', 'backbone', **kwargs)


LIBRARY = make_target(dict(type='ResNet'))  # images have three channels; autocast is needed


def test_functions_take_turns_in_alternating_order(monkeypatch):
    monkeypatch.setattr(timing, 'MIN_SECONDS', 0)
    calls, progress = [], []
    steps = {name: (lambda name=name: calls.append(name)) for name in 'abc'}
    times = time_in_turn(steps, 3, CPU, lambda: progress.append(1))
    assert ''.join(calls) == 'abc' + 'abc' + 'cba' + 'abc'
    assert [len(times[name]) for name in 'abc'] == [3, 3, 3]
    assert len(progress) == 3 * (3 + 1)


def test_short_functions_are_repeated(monkeypatch):
    monkeypatch.setattr(timing, '_seconds', lambda step, repeats, device: repeats * 0.03)
    assert time_in_turn(dict(a=None), 2, CPU)['a'] == pytest.approx([120, 120])  # 4 repeats


def test_ratios_are_within_rounds():
    found = spread(ratios([2, 4, 9], [1, 1, 3]))
    assert found == pytest.approx(dict(mean=3, std=1, min=2, q1=2.5, median=3, q3=3.5, max=4))
    assert spread([5])['std'] is None


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
    setting, target = replace(SMALL, dtype=dtype), make_target(MSVIT)
    images = make_images(target, setting)
    assert images.shape == (2, 3, 8, 8) and images.dtype == dtype
    assert images.equal(make_images(target, setting))
    network = Nested()
    make_step(target, network, replace(setting, train=True))()
    assert network.seen.pop() == (dtype, True, True)
    assert network.conv.weight.dtype == torch.float32 and network.conv.weight.grad is None
    make_step(target, network, setting)()
    assert network.seen.pop() == (dtype, False, False)
    assert network.conv.weight.dtype == dtype


def test_autocast_for_networks_that_make_float32_tensors():
    class Own(nn.Linear):
        def forward(self, x):
            return super().forward(x.flatten(1) + torch.zeros(1, dtype=torch.float32))

    setting = Setting((2, 2), dtype=torch.bfloat16)
    with pytest.raises(RuntimeError):
        make_step(make_target(MSVIT), Own(12, 2), setting)()
    make_step(LIBRARY, Own(12, 2), setting)()


def test_training_adds_the_losses_of_routers():
    class Router(nn.Linear):
        gradients = []

        def forward(self, x):
            publish(dict(loss_router=1000 * self.bias.sum(), ratio=self.bias.sum()))
            self.bias.register_hook(self.gradients.append)
            return super().forward(x.flatten(1))

    make_step(LIBRARY, Router(12, 2), Setting((2, 2), train=True))()
    assert Router.gradients[0].min() > 900


def test_training_publishes_the_loss_of_a_gate():
    network = MSViT(MSVIT['arch'])
    gradients = []
    network.gate_loss.register_full_backward_hook(lambda *_: gradients.append(True))
    make_step(make_target(MSVIT), network, Setting((64, 64), 2, train=True))()
    assert gradients and network.gate.layers[-1].bias.grad is None


@pytest.fixture
def quick(monkeypatch):
    """No repetition of short steps, and no processes for memory."""
    monkeypatch.setattr(timing, 'MIN_SECONDS', 0)
    monkeypatch.setattr(measuring, 'peak_mb', lambda *args: None)


def test_overrides_apply_to_the_sparse_network_alone(quick):
    free = make_target(DGE)
    sparse = replace(free, routing=dict(query_ratio=0.25))
    targets, progress = dict(sparse=sparse, dense=dense_target(sparse), free=free), []
    setting = Setting((64, 64), train=True)
    measured = measure(targets, setting, 1, on_progress=lambda: progress.append(1))
    assert len(progress) == count_progress(3, 1)
    found = {name: m.cost.ratios for name, m in measured.items()}
    assert found['sparse']['query_ratio'] == pytest.approx(0.25, abs=0.02)
    assert found['dense'] == {} and found['free']['query_ratio'] > 0.9
    with pytest.raises(ValueError, match='dense twin has no routers'):
        measure(dict(a=replace(targets['dense'], routing=sparse.routing)), setting)


@pytest.mark.parametrize(
    'changes, dtype',
    [
        (dict(train_mode='masked'), 'float32'),
        (dict(train_mode='gathered'), 'bfloat16'),
        (dict(out_type='tokens', gate=dict(loss=None)), 'float32'),
    ],
)
def test_training_steps_on_tokens_of_mixed_scale(changes, dtype, quick):
    cfg = Config(dict(model=dict(backbone=MSVIT | changes), default_scope='mmseg'))
    sparse = build_target(cfg, 'backbone', [0.25, 1.0])
    setting = Setting((64, 64), 2, train=True, dtype=getattr(torch, dtype))
    free = replace(sparse, routing={})
    measured = measure(dict(sparse=sparse, dense=dense_target(sparse), free=free), setting, 1)
    cost, dense = measured['sparse'].cost, measured['dense'].cost
    assert cost.ratios['coarse_ratio'] == (0.25 + 1) / 2
    assert cost.ratios['query_ratio'] == pytest.approx((13 / 16 + 4 / 16) / 2)
    assert cost.macs < dense.macs < measured['free'].cost.macs
    assert measured['free'].cost.ratios['coarse_ratio'] == 0  # untrained


def test_profile_sorts_operators_by_kind_of_work():
    weight, tokens = torch.randn(64, 64), torch.randn(512, 64)
    products = profile_step(lambda: tokens @ weight, CPU)
    assert set(products) == {*KINDS, OTHER} and max(products, key=products.get) == 'matrix products'
    moved = profile_step(tokens.clone, CPU)
    assert max(moved, key=moved.get) == 'copies and indices'


def test_operators_of_a_profile_exist():
    """A name that torch does not have would go unnoticed into the rest."""
    names = ' '.join(KINDS.values()).split()
    missing = {name for name in names if not hasattr(torch.ops.aten, name)}
    later = '_scaled_dot_product_flash_attention_for_cpu'  # in torch 2.1 it is that of GPUs
    assert missing == ({later, f'{later}_backward'} if TORCH_2_1 else set())


def test_time_is_that_of_the_parts_of_a_model(monkeypatch):
    """Also of a head that is called by its method, and not of children that are not called."""
    clock = [0.0]
    monkeypatch.setattr(parts.time, 'perf_counter', lambda: clock[0])

    class Part(nn.Module):
        def __init__(self, seconds):
            super().__init__()
            self.seconds = seconds

        def forward(self, x):
            clock[0] += self.seconds
            return x

    model = nn.ModuleDict(dict(backbone=Part(0.004), head=Part(0.002), idle=Part(0)))

    def step():
        x = model['backbone'](torch.zeros(1))
        clock[0] += 0.001
        model['head'].forward(x)

    found = time_parts(step, model, CPU)
    assert list(found) == ['backbone', 'head', REST]
    assert list(found.values()) == pytest.approx([4, 2, 1])
    assert 'forward' not in vars(model['head'])


@pytest.mark.skipif(not memory.CLEAR_REFS.exists(), reason='only Linux tells the peak')
def test_peak_memory_is_above_the_weights():
    """In a process of its own, which an error comes back from."""
    arch = dict(embed_dims=32, depths=(2, 2, 6, 2), num_heads=(1, 2, 4, 8))
    target = make_target(dict(type='mmtoken.STViTRSwin', arch=arch, out_indices=(0,)))
    setting = Setting((256, 256), 4, train=True)
    # Four images of 64 x 64 tokens; training keeps at least the 128 channels of two MLPs.
    assert 2 * 8 < memory.peak_mb(target, setting, None) < 400
    wrong = make_target(DGE, routing=dict(coarse_ratio=0.5))
    with pytest.raises(ValueError, match='this network has a query_ratio'):
        memory.peak_mb(wrong, Setting((64, 64)), None)


def test_a_graph_is_captured_after_calls_on_a_side_stream(monkeypatch):
    """In stand-ins for what a GPU has."""
    log = []

    class Stream:
        def __init__(self, name='side'):
            self.name = name

        def wait_stream(self, other):
            log.append(f'{self.name} waits for {other.name}')

    class Graph:
        def replay(self):
            log.append('replay')

    @contextmanager
    def using(thing, *args):
        log.append(type(thing).__name__)
        yield
        log.append('end')

    replacements = dict(
        Stream=Stream, CUDAGraph=Graph, current_stream=lambda: Stream('main'), stream=using,
        graph=using,
    )  # fmt: skip
    for name, value in replacements.items():
        monkeypatch.setattr(torch.cuda, name, value)
    network = Nested()
    network.forward = lambda x: log.append(tuple(x.shape))
    step = make_step(make_target(MSVIT), network, replace(SMALL, captured=True))
    call = (2, 3, 8, 8)
    assert log == [
        'side waits for main', 'Stream', call, call, call, 'end', 'main waits for side',
        'Graph', call, 'end',
    ]  # fmt: skip
    log.clear()
    step()
    assert log == ['replay']
