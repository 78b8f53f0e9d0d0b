"""Released files of DGE, by their names and shapes."""

import argparse

import pytest
import torch

from mmtoken.backbones import DGEDPVT, DGEPVT, DGEDeiT
from mmtoken.checkpoints import convert, detect_source, fit_to, load_into

from ..conftest import dge_weights

MODELS = {
    'pvt-dge': (DGEPVT, dict(pretrain_img_size=256)),
    'deit-dge': (DGEDeiT, dict(img_size=256)),
    'dpvt': (DGEDPVT, dict(pretrain_img_size=256)),
}
NUM_TENSORS = {'pvt-dge': 349, 'deit-dge': 212, 'dpvt': 280}
ROUTED = ('pvt-dge', 'deit-dge')


def build(model, **kwargs):
    kind, args = MODELS[model]
    with torch.device('meta'):
        return kind(**{**args, 'budget': None, **kwargs})


@pytest.mark.parametrize('model', MODELS)
def test_backbones_take_released_files(model):
    weights = dge_weights(model)
    assert len(weights) == NUM_TENSORS[model]
    assert detect_source(weights) == 'vtpack'
    ours = build(model, **({} if model == 'dpvt' else dict(cls_token=True)))
    state, report = fit_to(ours, weights, 'a.pth')

    own = ours.state_dict()
    assert report.origin == f'vtpack ({"DeiT" if model == "deit-dge" else "PVT"} names)'
    assert set(state) == set(own) - set(report.newly_initialized)
    for name, tensor in state.items():
        assert torch.equal(tensor, weights[report.mapped[name]])
        assert tensor.shape == own[name].shape
    fresh = {name.split('.', 4)[-1] for name in report.newly_initialized}
    assert fresh == ({'router.gate.weight', 'router.gate.bias'} if model == 'dpvt' else set())
    unused = {'head.weight', 'head.bias'} | {n for n in weights if n.endswith('.dge.splits')}
    if model != 'deit-dge':
        unused |= {'norm.weight', 'norm.bias'}
    assert set(report.dropped) == unused
    assert not report.resized and not report.split and not report.unknown


@pytest.mark.parametrize('model', MODELS)
def test_convert(model):
    weights = dge_weights(model)
    state, report = convert(weights, 'vtpack')
    assert set(state) == set(report.mapped)
    assert len(report.mapped) + len(report.dropped) == len(weights)
    assert {name.split('.')[-1] for name in report.dropped} <= {'splits', 'weight', 'bias'}
    assert all(state[ours] is weights[theirs] for ours, theirs in report.mapped.items())


def test_names_of_the_parts():
    for model, ours, theirs in (
        ('pvt-dge', 'layers.2.blocks.5.router.gate.bias', 'block3.5.dge.router.gate.bias'),
        ('pvt-dge', 'layers.3.cls_token', 'cls_token'),
        ('deit-dge', 'blocks.11.router.gate.weight', 'blocks.11.dge.router.gate.weight'),
        ('deit-dge', 'blocks.0.attn.kv.weight', 'blocks.0.attn.kv.weight'),
        ('dpvt', 'layers.0.blocks.0.attn.value.bias', 'block1.0.attn.v.bias'),
        ('dpvt', 'layers.3.blocks.2.attn.weights.bias', 'block4.2.attn.attn_weight.bias'),
        ('dpvt', 'layers.3.blocks.2.attn.offsets.bias', 'block4.2.attn.offsets.bias'),
    ):
        assert convert(dge_weights(model), 'vtpack')[1].mapped[ours] == theirs


@pytest.mark.parametrize('model', ROUTED)
def test_detectors_of_other_sizes(model):
    """Without a class token, and laid out for other images than the model."""
    size = dict(img_size=224) if model == 'deit-dge' else dict(pretrain_img_size=224)
    ours = build(model, **size)
    weights = dge_weights(model)
    state, report = fit_to(ours, weights, 'a.pth')
    positions = (
        ['pos_embed'] if model == 'deit-dge' else [f'layers.{i}.pos_embed' for i in range(4)]
    )
    assert set(report.grids) == set(positions)
    for name in positions:
        rows, columns = report.grids[name]
        assert state[name].shape[1] == rows * columns
        expected = weights[report.mapped[name]].flatten()[0]
        torch.testing.assert_close(state[name], expected.expand_as(state[name]))
    assert any(name.endswith('cls_token') for name in report.dropped)
    assert report.newly_initialized == []


def test_distilled():
    weights = dge_weights('deit-dge')
    weights['dist_token'] = torch.zeros(1, 1, 384)
    position = weights['pos_embed'] = torch.arange(258.0).view(1, -1, 1).repeat(1, 1, 384)
    assert detect_source(weights) == 'vtpack'
    state, report = fit_to(build('deit-dge', cls_token=True), weights, 'a.pth')
    assert torch.equal(state['pos_embed'], torch.cat([position[:, :1], position[:, 2:]], dim=1))
    assert 'dist_token' in report.dropped


def test_file_of_a_training_run(save):
    """Whose container has other things beside, and whose values end up in the model."""
    arch = dict(
        embed_dims=(8, 8), depths=(1, 1), num_heads=(1, 1), mlp_ratios=(2, 2), sr_ratios=(2, 1)
    )
    ours = DGEPVT(arch, out_indices=(0, 1), pretrain_img_size=32, budget=None)
    content = {}
    for name, tensor in ours.state_dict().items():
        stage, rest = int(name.split('.')[1]) + 1, name.split('.', 2)[2]
        start, _, end = rest.partition('.')
        new = f'block{stage}.{end}' if start == 'blocks' else f'{start}{stage}.{end}'.rstrip('.')
        content[new.replace('.router.', '.dge.router.')] = torch.randn_like(tensor)
    content['block1.0.dge.splits'] = content['block2.0.dge.splits'] = torch.tensor([4, 2, 1])
    file = save(dict(model=content, optimizer={}, epoch=3, args=argparse.Namespace(lr=1)))
    report = load_into(ours, file)
    assert report.source == 'vtpack' and report.newly_initialized == []
    for name, theirs in report.mapped.items():
        assert torch.equal(ours.state_dict()[name], content[theirs])


# Granularities


@pytest.mark.parametrize('model', ROUTED)
@pytest.mark.parametrize(
    'args, has',
    [
        (dict(granularities=(1, 2)), r'granularities \(1, 2\) in regions of 4, .*\(4, 2\)'),
        (dict(granularities=(1,)), r'granularities \(1,\) in regions of 4, .*\(4,\)'),
        (dict(region_size=8), r'granularities \(1, 2, 4\) in regions of 8, .*\(8, 4, 2\)'),
    ],
)
def test_other_granularities_are_refused(model, args, has):
    with pytest.raises(ValueError, match=rf'a\.pth: its dge\.splits are \(4, 2, 1\), but .*{has}'):
        fit_to(build(model, **args), dge_weights(model), 'a.pth')


def test_other_splits_are_refused():
    weights = dge_weights('pvt-dge')
    weights['block2.1.dge.splits'] = torch.tensor([4, 2])
    with pytest.raises(ValueError, match=r'splits are \(4, 2\) and \(4, 2, 1\), but DGEPVT has'):
        fit_to(build('pvt-dge'), weights, 'a.pth')


def test_other_routers_are_refused():
    weights = {n: t for n, t in dge_weights('pvt-dge').items() if not n.endswith('.splits')}
    with pytest.raises(ValueError, match=r'shapes: .*router\.gate\.\w+ \(3,.* instead of \(2,'):
        fit_to(build('pvt-dge', granularities=(1, 2)), weights, 'a.pth')


# What differs


def test_routers_come_all_or_none(save):
    weights = dge_weights('pvt-dge')
    del weights['block3.2.dge.router.gate.bias']
    with pytest.raises(ValueError, match=r'lacks: layers\.2\.blocks\.2\.router\.gate\.bias$'):
        fit_to(build('pvt-dge'), weights, 'a.pth')
    ours = DGEDeiT(dict(embed_dims=8, num_layers=2, num_heads=1, feedforward_channels=8))
    state = ours.state_dict()
    del state['blocks.1.router.gate.weight']
    with pytest.raises(ValueError, match=r'lacks: blocks\.1\.router\.gate\.weight$'):
        load_into(ours, save(state))


@pytest.mark.parametrize('model', ROUTED)
def test_parts_that_are_missing(model):
    weights = dge_weights(model)
    for name in ('cls_token', next(name for name in weights if name.endswith('mlp.fc1.weight'))):
        damaged = {key: tensor for key, tensor in weights.items() if key != name}
        with pytest.raises(ValueError, match=rf'read as vtpack .*it lacks: .*{name[-10:]}'):
            fit_to(build(model, cls_token=True), damaged, 'a.pth')


@pytest.mark.parametrize('model', MODELS)
@pytest.mark.parametrize('target', MODELS)
def test_networks_are_not_confused(model, target):
    if model != target:
        with pytest.raises(ValueError, match=r'does not fit DGE\w+; it was read as vtpack'):
            fit_to(build(target), dge_weights(model), 'a.pth')


def test_unknown_parts():
    weights = dict(dge_weights('pvt-dge'), **{'block1.0.dge.temperature': torch.zeros(1)})
    with pytest.raises(ValueError, match=r'variant of vtpack \(PVT names\) .*dge\.temperature'):
        convert(weights, 'vtpack')
