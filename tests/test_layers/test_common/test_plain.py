"""What counts as a layer that nobody has replaced and nobody watches."""

import copy
import pickle

import pytest
import torch
from timm.layers import DropPath, Mlp
from torch import nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrizations, prune

from mmtoken.layers.common.plain import (
    all_plain,
    draws,
    hooks_ignored,
    is_plain,
    is_plain_conv,
    know,
    weight_dtype,
)


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.mlp, self.missing = nn.LayerNorm(4), Mlp(4, 8), None

    def forward(self, x):
        return self.mlp(self.norm(x))


class Subclass(nn.Linear):
    pass


@pytest.fixture(autouse=True)
def own_is_known(monkeypatch):
    monkeypatch.setattr('mmtoken.layers.common.plain._KNOWN', {nn.Linear: nn.Linear.forward})
    for kind in (Own, Mlp, nn.LayerNorm, nn.GELU, nn.Dropout, nn.Identity, nn.Conv2d, DropPath):
        know(kind)


def test_layers_as_they_were_built():
    block = Own()
    assert all_plain() and all_plain(block) and all_plain(block.norm, block.mlp)
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert all_plain(other)
    assert is_plain(block.mlp.fc1, nn.Linear) and not is_plain(block.norm, nn.Linear)


HOOKS = [
    'register_forward_hook', 'register_forward_pre_hook', 'register_full_backward_hook',
    'register_full_backward_pre_hook',
]  # fmt: skip


@pytest.mark.parametrize('register', HOOKS)
def test_hooks(register):
    block = Own()
    hook = getattr(block.mlp.fc1, register)(lambda *args: None)
    assert not all_plain(block) and all_plain(block.norm)
    with hooks_ignored():
        assert all_plain(block)
    assert not all_plain(block)
    hook.remove()
    assert all_plain(block)


@pytest.mark.parametrize('register', HOOKS)
def test_hooks_on_all_modules(register):
    hook = getattr(torch_module, register.replace('_', '_module_', 1))(lambda *args: None)
    try:
        assert not all_plain(Own()) and not is_plain(nn.Linear(1, 1), nn.Linear)
        with hooks_ignored():
            assert all_plain(Own())
    finally:
        hook.remove()
    assert all_plain(Own())


@pytest.mark.parametrize(
    'change',
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        lambda layer: prune.identity(layer, 'weight'),
        lambda layer: setattr(layer, 'forward', lambda x: x),
        lambda layer: setattr(layer, '__class__', Subclass),
        lambda layer: setattr(layer, 'weight', OtherParameter(torch.zeros(1))),
    ],
)
def test_changed_layers(change):
    block = Own()
    change(block.mlp.fc1)
    assert not all_plain(block) and not is_plain(block.mlp.fc1, nn.Linear)


class OtherParameter(nn.Parameter):
    """As quantised weights are."""


def test_a_patched_class(monkeypatch):
    monkeypatch.setattr(nn.Linear, 'forward', lambda self, x: x)
    assert not all_plain(Own()) and not is_plain(nn.Linear(1, 1), nn.Linear)


def test_unknown_classes():
    block = Own()
    block.mlp.act = nn.Softmax(0)
    assert not all_plain(block)


def test_random_parts_that_train():
    block = Own().eval()
    for layer in (nn.Dropout(0.5), DropPath(0.5)):
        block.mlp.drop1 = layer.eval()
        assert all_plain(block) and not draws(layer)
        layer.train()
        assert not all_plain(block) and draws(layer)
    block.mlp.drop1 = nn.Dropout(0.0)
    assert all_plain(block)
    assert not draws(DropPath(0.0)) and draws(nn.Identity())


def test_geometry():
    assert is_plain_conv(nn.Conv2d(4, 8, 3, padding=1), 3, padding=1)
    assert is_plain_conv(nn.Conv2d(4, 8, 2, 2), 2, 2)
    assert is_plain_conv(nn.Conv2d(4, 4, 1, groups=4), 1, groups=4)
    for kwargs in (
        dict(padding=0), dict(padding='same'), dict(stride=2), dict(dilation=2), dict(groups=2),
        dict(kernel_size=(3, 1)), dict(padding_mode='circular'),
    ):  # fmt: skip
        conv = nn.Conv2d(4, 4, **(dict(kernel_size=3, padding=1) | kwargs))
        assert not is_plain_conv(conv, 3, padding=1)
    assert not is_plain_conv(nn.Linear(4, 4), 3)


def test_weight_dtype():
    layer = nn.Linear(2, 2).half()
    assert weight_dtype(layer) == torch.half
    layer.weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False)
    assert weight_dtype(layer) == torch.half
    assert weight_dtype(nn.Identity()) == torch.float32


def test_it_can_be_compiled():
    block = Own()

    def path(x):
        return x + (1 if all_plain(block) else 2)

    x = torch.zeros(1)
    assert torch.compile(path, backend='eager')(x) == 1
    block.mlp.fc1.register_forward_hook(lambda *args: None)
    torch.compiler.reset()
    assert torch.compile(path, backend='eager')(x) == 2
