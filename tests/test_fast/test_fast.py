"""Layers with a tiled forward: it equals the ordinary one and is taken in CPU inference alone."""

import pytest
import torch
from helpers import randomize

from mmtoken.fast import optimize_for_cpu, tiling
from mmtoken.layers.common.stem import ConvStem
from mmtoken.layers.common.swin import SwinBlock
from mmtoken.runtime.reference import reference_path

# Each layer, and the shape of its input
LAYERS = {
    'swin block': (lambda: SwinBlock(24, 3, window_size=4), (2, 13, 10, 24)),
    'shifted swin block': (lambda: SwinBlock(24, 3, window_size=4, shift=2), (2, 13, 10, 24)),
    'swin block without padding': (lambda: SwinBlock(24, 3, window_size=4), (2, 12, 8, 24)),
    'swin block of one window': (lambda: SwinBlock(24, 3, window_size=7, shift=3), (2, 3, 5, 24)),
    'conv stem': (lambda: ConvStem(16), (2, 3, 50, 38)),
    'conv stem without padding': (lambda: ConvStem(16), (1, 3, 64, 32)),
}


@pytest.fixture(params=LAYERS)
def case(request, monkeypatch):
    """A layer that works in small tiles, an input, and the calls of its ordinary forward."""
    monkeypatch.setattr(tiling, 'TILE_ELEMENTS', 24 * 20)
    make, shape = LAYERS[request.param]
    layer, calls = randomize(make()).eval(), []
    kind, forward = type(layer), type(layer).forward
    optimize_for_cpu(layer)

    def count(self, *args, **kwargs):
        calls.append(kind)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(kind, 'forward', count)
    return layer, torch.randn(shape), calls


@torch.no_grad()
def test_equals_the_ordinary_forward(case):
    layer, x, calls = case
    tiled = layer(x)
    assert not calls
    optimize_for_cpu(layer, enabled=False)
    torch.testing.assert_close(tiled, layer(x), atol=1e-4, rtol=1e-4)
    assert len(calls) == 1


def test_is_not_taken_under_grad(case):
    layer, x, calls = case
    layer(x)
    assert len(calls) == 1


@torch.no_grad()
def test_is_not_taken_in_training(case):
    layer, x, calls = case
    layer.train()(x)
    assert len(calls) == 1


@torch.no_grad()
def test_is_not_taken_on_the_reference_path(case):
    layer, x, calls = case
    with reference_path():
        layer(x)
    assert len(calls) == 1


@torch.no_grad()
def test_is_not_taken_when_a_hook_watches(case):
    layer, x, calls = case
    inner = list(layer.children())[-1]
    hook = inner.register_forward_hook(lambda *args: None)
    layer(x)
    assert len(calls) == 1
    hook.remove()
    layer(x)
    assert len(calls) == 1


@torch.no_grad()
def test_is_not_compiled(case):
    layer, x, calls = case
    expected = layer(x)
    torch.compiler.reset()
    out = torch.compile(layer, backend='eager')(x)
    assert calls
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
