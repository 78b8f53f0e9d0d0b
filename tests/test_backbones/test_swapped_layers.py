"""Whoever replaces, parametrises or watches a layer gets what they asked for, on every path.

Fast paths read weights, fold layers or call them tile by tile. Tiles are made tiny here, so that
all of it happens in small images too.
"""

import copy
import re
from collections import defaultdict

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, SHORT_VIT
from mmengine.model import revert_sync_batchnorm
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize, prune
from torch.nn.utils.fusion import fuse_conv_bn_eval

import mmtoken
from mmtoken.fast import tiling
from mmtoken.layers.common.gate import RegionGate
from mmtoken.layers.dge.block import GranularityRouter
from mmtoken.registry import MODELS
from mmtoken.runtime.reference import reference_path

SHORT_SWAT_VIT = dict(SHORT_VIT, patch_size=16, mlp_kernel=3)
FPN = dict(in_channels=32, out_channels=8, scales=(2, 1), num_outs=2)

# A backbone, and behind some a neck
NETWORKS = {
    **{
        f'{name}{form}': [dict(type=name, **args)]
        for name, family in FAMILIES.items()
        for form, args in family.networks.items()
    },
    'SimpleFeaturePyramid': [
        dict(type='SWATDeiT', arch=SHORT_SWAT_VIT, plane_size=4),
        dict(type='SimpleFeaturePyramid', norm='BN', **FPN),
    ],
    'SemanticRecoveryNeck': [
        dict(type='STViTDeiT', arch=SHORT_VIT, base_layers=1, out_type='tokens'),
        dict(type='SemanticRecoveryNeck', num_heads=2, **FPN),
    ],
    'MixedScaleNeck': [
        dict(type='MSViT', arch=SHORT_VIT, out_type='tokens'),
        dict(type='MixedScaleNeck', refine=True, **FPN),
    ],
    'GrainUnpoolNeck': [
        dict(type='SWATDeiT', arch=SHORT_SWAT_VIT, structured=False),
        dict(type='GrainUnpoolNeck', in_channels=32, out_channels=8, num_heads=2, sr_ratios=2),
    ],
}
LAYERS = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d, nn.LayerNorm, nn.BatchNorm2d)
IMAGE = torch.randn(2, 3, 9, 7, generator=torch.Generator().manual_seed(3))
IMAGE = (2 * IMAGE).repeat_interleave(8, 2).repeat_interleave(8, 3) + IMAGE.repeat(1, 1, 8, 8)


@pytest.fixture(autouse=True)
def tiny_tiles(monkeypatch):
    monkeypatch.setattr(tiling, 'TILE_ELEMENTS', 800)
    monkeypatch.setattr(tiling, 'TILE_ELEMENTS', 800)


@pytest.fixture(params=NETWORKS)
def network(request):
    return build(request.param)


def build(name):
    """A network whose every weight matters and whose routers choose this and that."""
    torch.manual_seed(0)
    network = nn.Sequential(
        *(MODELS.build(dict(cfg, type=f'mmtoken.{cfg["type"]}')) for cfg in NETWORKS[name])
    )
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        for module in network.modules():
            if isinstance(module, (nn.LayerNorm, nn.BatchNorm2d)):
                module.bias.add_(torch.rand_like(module.bias))
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-0.5, 0.5)
                module.running_var.uniform_(0.5, 2)
            if isinstance(module, (GranularityRouter, RegionGate)):
                last = [m for m in module.modules() if isinstance(m, nn.Linear)][-1]
                last.weight.normal_()
                last.bias.zero_()
    network.double().eval()
    for gate in [m for m in network.modules() if isinstance(m, RegionGate)]:
        hook = gate.register_forward_hook(halve)
        run(network)
        hook.remove()
    return network


def halve(gate, args, scores):
    """Let half of the regions be coarse."""
    with torch.no_grad():
        gate.layers[-1].bias.sub_(scores[..., 1].median())


def run(network, grad=False, dtype=torch.float64):
    with torch.set_grad_enabled(grad):
        return network(IMAGE.to(dtype))


def kinds(network, types):
    """The first layer of each name without numbers."""
    first = {}
    for name, module in network.named_modules():
        if isinstance(module, types):
            first.setdefault(re.sub(r'\d+', '*', name), name)
    return list(first.values())


def assert_close(outs, expected):
    for out, other in zip(outs, expected, strict=True):
        torch.testing.assert_close(out, other, atol=1e-8, rtol=1e-8)


def differ(outs, others):
    return any(
        out.shape != other.shape or not torch.allclose(out, other, atol=1e-6, rtol=1e-6)
        for out, other in zip(outs, others, strict=True)
    )


def shapes(values):
    """Of the tensors among the arguments of a call, or of its result."""
    values = values if isinstance(values, tuple) else (values,)
    return tuple(tuple(value.shape) for value in values if isinstance(value, torch.Tensor))


class Calls:
    """The calls of layers: ``{name: [(shapes of arguments, shapes of the result)]}``."""

    def __init__(self, network):
        self.names = {module: name for name, module in network.named_modules()}
        self.calls = defaultdict(list)

    def __call__(self, module, args, out):
        self.calls[self.names[module]].append((shapes(args), shapes(out)))

    def of(self, network, watched, grad):
        self.calls.clear()
        hooks = [network.get_submodule(name).register_forward_hook(self) for name in watched]
        run(network, grad)
        for hook in hooks:
            hook.remove()
        return dict(self.calls)


# Hooks


def test_hooks_see_every_layer_on_every_path(network):
    """As often and with the same tensors whoever else watches, with and without autograd."""
    calls, names = Calls(network), [name for name, _ in network.named_modules()]
    expected = calls.of(network, names, grad=True)
    for name in set(names) - set(expected):
        layer = network.get_submodule(name)
        ours = type(layer).__module__.startswith('mmtoken.layers')
        assert not ours and not isinstance(layer, LAYERS), f'{name} is never called'
    assert calls.of(network, names, grad=False) == expected
    with reference_path():
        assert {name: len(c) for name, c in calls.of(network, names, False).items()} == {
            name: len(c) for name, c in expected.items()
        }
    for name in kinds(network, nn.Module):
        seen = calls.of(network, [name], grad=False)
        assert seen == {name: expected[name]} if name in expected else not seen, name


def test_hooks_on_all_modules_of_the_process(network):
    calls = Calls(network)
    expected = calls.of(network, calls.names.values(), grad=True)
    calls.calls.clear()
    hook = register_module_forward_hook(calls)
    try:
        run(network)
    finally:
        hook.remove()
    assert calls.calls == expected


@pytest.mark.parametrize('kind', ['output', 'input'])
def test_hooks_change_what_they_will(network, kind):
    before = run(network)
    for name in kinds(network, LAYERS):
        layer = network.get_submodule(name)
        if kind == 'output':
            hook = layer.register_forward_hook(lambda module, args, out: out.sin())
        else:
            hook = layer.register_forward_pre_hook(lambda module, args: (args[0].sin(),))
        outs, expected = run(network), run(network, grad=True)
        hook.remove()
        assert_close(outs, expected)
        assert differ(outs, before) or is_router(name), name
    assert_close(run(network), before)


def is_router(name):
    """Layers that the output does not show, as long as no region chooses anew."""
    return 'gate' in name.split('.')


def test_backward_hooks(network):
    seen, hooks = set(), []
    for name in kinds(network, LAYERS):
        layer = network.get_submodule(name)
        hooks.append(layer.register_full_backward_hook(lambda *args, name=name: seen.add(name)))
    network.train()
    with mmtoken.token_losses() as published:
        outs = run(network, grad=True)
    (sum(out.square().sum() for out in outs) + published.total()).backward()
    assert seen == set(kinds(network, LAYERS))


# Other layers


class Adapter(nn.Module):
    """As of LoRA: a layer and a small change, without a layer's attributes."""

    def __init__(self, layer):
        super().__init__()
        self.base = layer
        width = layer.weight[0].numel()
        change = 0.3 * torch.randn(len(layer.weight), width) / width**0.5
        self.register_buffer('change', change.to(layer.weight))

    def forward(self, x):
        return self.base(x) + F.linear(x, self.change)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def replace(network, name, layer):
    parent, _, last = name.rpartition('.')
    setattr(network.get_submodule(parent), last, layer)


def adapt(network, name):
    """Returns the weight that does the same as layer and adapter."""
    adapter = Adapter(network.get_submodule(name))
    replace(network, name, adapter)
    return adapter.base.weight + adapter.change


def double_by_subclass(network, name):
    class DoubledLinear(nn.Linear):
        def forward(self, x):
            return F.linear(x, 2 * self.weight, self.bias)

    layer = network.get_submodule(name)
    layer.__class__ = DoubledLinear
    return 2 * layer.weight


def double_by_patch(network, name):
    layer = network.get_submodule(name)
    layer.forward = lambda x: F.linear(x, 2 * layer.weight, layer.bias)
    return 2 * layer.weight


def double_by_parametrisation(network, name):
    layer = network.get_submodule(name)
    parametrize.register_parametrization(layer, 'weight', Doubled())
    return layer.weight


def double_by_pre_hook(network, name):
    """As the older ``weight_norm`` and ``prune`` do: the weight is no parameter any more."""
    layer = network.get_submodule(name)
    layer.kept = layer.weight
    del layer.weight
    layer.register_forward_pre_hook(lambda module, args: setattr(module, 'weight', 2 * module.kept))
    return 2 * layer.kept


LINEAR, WEIGHTED = (nn.Linear,), LAYERS[:3]
CHANGES = {
    adapt: LINEAR,
    double_by_subclass: LINEAR,
    double_by_patch: LINEAR,
    double_by_parametrisation: WEIGHTED,
    double_by_pre_hook: WEIGHTED,
}


def change_some(network, change, names):
    """A changed network, and one with the weights that should do the same."""
    changed, plain = copy.deepcopy(network), copy.deepcopy(network)
    with torch.no_grad():
        for name in names:
            plain.get_submodule(name).weight.copy_(change(changed, name))
    return changed, plain


@pytest.mark.parametrize('change', CHANGES)
def test_changed_weights_are_those_in_use(network, change):
    """The first call was made before: nothing of a weight is kept."""
    before = run(network)
    names = [n for n, m in network.named_modules() if isinstance(m, CHANGES[change])]
    changed, plain = change_some(network, change, names)
    expected = run(plain)
    assert_close(run(changed), expected)
    assert_close(run(changed, grad=True), expected)
    with reference_path():
        assert_close(run(changed), expected)
    assert differ(expected, before)


@pytest.mark.parametrize('change', [adapt, double_by_parametrisation])
def test_one_changed_weight_among_others(network, change):
    before = run(network)
    for name in kinds(network, CHANGES[change]):
        changed, plain = change_some(network, change, [name])
        outs = run(changed)
        assert_close(outs, run(plain))
        assert differ(outs, before) or is_router(name), name


def test_a_changed_layer_trains(network):
    """No attribute of a layer is asked for that an adapter need not have."""
    for name in [n for n, m in network.named_modules() if isinstance(m, nn.Linear)]:
        adapt(network, name)
    for name in [n for n, m in network.named_modules() if type(m).__name__ == 'DropPath']:
        replace(network, name, nn.Identity())
    network.train()
    with mmtoken.token_losses() as published:
        outs = run(network, grad=True)
    (sum(out.square().sum() for out in outs) + published.total()).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name


@pytest.mark.parametrize('other', [nn.Identity(), nn.LayerNorm((), elementwise_affine=False)])
def test_replaced_norms_and_activations(network, other):
    types = (nn.GELU,) if isinstance(other, nn.LayerNorm) else (nn.LayerNorm,)
    for name in [n for n, m in network.named_modules() if isinstance(m, types)]:
        replace(network, name, nn.ReLU() if types == (nn.GELU,) else other)
    outs = run(network)
    assert_close(outs, run(network, grad=True))
    with reference_path():
        assert_close(outs, run(network))


class OverTheGrid(nn.Module):
    """What does not treat tokens alone: it sees of which grid or row they are."""

    def forward(self, x):
        return x - x.mean()


def test_layers_that_do_not_treat_tokens_alone(network):
    before = run(network)
    for name in kinds(network, (nn.Linear, nn.LayerNorm)):
        layer = network.get_submodule(name)
        replace(network, name, nn.Sequential(layer, OverTheGrid()))
        outs = run(network)
        assert_close(outs, run(network, grad=True))
        replace(network, name, layer)
    assert_close(run(network), before)


def test_dynamic_quantisation(network):
    """Its scales are of a whole call, so that tiles would have others."""
    quantize = getattr(getattr(torch.ao, 'quantization', None), 'quantize_dynamic', None)
    if quantize is None:
        pytest.skip('this torch has no dynamic quantisation')
    network.float()
    quantised = quantize(network, {nn.Linear}, dtype=torch.qint8)
    assert not any(type(module) is nn.Linear for module in quantised.modules())
    runs = [run(quantised, grad, torch.float32) for grad in (False, True)]
    for out, other, full in zip(*runs, run(network, dtype=torch.float32), strict=True):
        # Rounding may fall to the other side.
        assert (out - other).abs().mean() < 0.05 * full.abs().mean()
        assert (out - full).abs().mean() < 0.5 * full.abs().mean()


@pytest.mark.parametrize('tool', ['prune', 'weight_norm', 'spectral_norm', 'copy', 'sync'])
def test_tools_of_torch_and_mmengine(network, tool):
    names = [n for n, m in network.named_modules() if isinstance(m, WEIGHTED)]
    expected = run(network)
    if tool == 'copy':
        network = copy.deepcopy(network)
    elif tool == 'sync':
        network = revert_sync_batchnorm(nn.SyncBatchNorm.convert_sync_batchnorm(network))
    else:
        for name in names:
            layer = network.get_submodule(name)
            if tool == 'prune':
                prune.l1_unstructured(layer, 'weight', 0.3)
            elif tool == 'weight_norm':
                nn.utils.parametrizations.weight_norm(layer)
            else:
                nn.utils.parametrizations.spectral_norm(layer)
    network.eval()  # torch 2.1 makes a SyncBatchNorm that is in training mode
    outs = run(network)
    assert_close(outs, run(network, grad=True))
    assert differ(outs, expected) == (tool in ('prune', 'spectral_norm'))


def test_fused_batch_norm():
    network = build('STViTRSwin')
    expected, stem = run(network), network[0].patch_embed.proj
    for i in (0, 2):
        stem[i].c, stem[i].bn = fuse_conv_bn_eval(stem[i].c, stem[i].bn), nn.Identity()
    assert_close(run(network), expected)


@pytest.mark.parametrize(
    'change',
    [
        dict(padding_mode='reflect'),
        dict(dilation=2, padding=lambda conv: tuple(2 * p for p in conv.padding)),
        dict(stride=1, kernel_size=1, padding=0),
    ],
)
def test_convolutions_of_another_geometry(network, change):
    """An ordinary layer, which fast paths built for another cannot stand for."""
    for name in kinds(network, nn.Conv2d):
        conv = network.get_submodule(name)
        if 'stride' in change and conv.stride != (1, 1):
            continue
        kwargs = dict(
            kernel_size=conv.kernel_size, stride=conv.stride, padding=conv.padding,
            groups=conv.groups, bias=conv.bias is not None,
        )  # fmt: skip
        kwargs |= {k: v(conv) if callable(v) else v for k, v in change.items()}
        replace(network, name, nn.Conv2d(conv.in_channels, conv.out_channels, **kwargs).double())
        try:
            expected = run(network, grad=True)
        except (RuntimeError, ValueError, IndexError):  # a grid that does not fit what follows
            expected = None
        if expected is not None:
            assert_close(run(network), expected)
            with reference_path():
                assert_close(run(network), expected)
        replace(network, name, conv)
