"""Released files of SWAT, by their names and shapes, and by what the DeiT computes."""

import json
import zlib

import numpy as np
import pytest
import torch

from mmtoken.backbones.swat_deit import SWATDeiT
from mmtoken.backbones.swat_swin import SWATSwin
from mmtoken.checkpoints import convert, detect_source, fit_to, load_into

from ..conftest import DATA

OUTPUT_NORMS = {f'norm{i}.{kind}' for i in range(4) for kind in ('weight', 'bias')}


def released_swin():
    """Names and shapes of the released Swin-T; each tensor is one number, repeated."""
    rows = json.loads((DATA / 'swat_swin_t_params.json').read_text())
    weights = {name: torch.tensor(float(i)).expand(shape) for i, (name, shape) in enumerate(rows)}
    for name in ('layers.0.blocks.1.attn_mask', 'layers.0.blocks.0.attn.relative_position_index'):
        weights[name] = torch.zeros(64, 49, 49)
    return weights


def released_deit():
    """Names of the released DeiT-Ti, and the weights that the golden values were computed with."""
    rows = json.loads((DATA / 'swat_deit_ti_params.json').read_text())
    weights = {}
    for name, shape in rows:
        place = torch.arange(1, 1 + int(np.prod(shape)), dtype=torch.float64)
        phase = 0.01 * (zlib.crc32(name.encode()) % 1000)
        norm = name.endswith('weight') and ('.norm' in name or name.startswith('norm'))
        weights[name] = (0.05 * torch.sin(0.1 * place + phase) + norm).view(shape)
    return weights


def build(kind, *args, **kwargs):
    with torch.device('meta'):
        return kind(*args, **kwargs)


def test_swin_takes_the_released_file():
    weights = released_swin()
    assert detect_source(weights) == 'swat'
    model = build(SWATSwin, 'tiny')
    state, report = fit_to(model, weights, 'a.pth')
    own = model.state_dict()
    assert report.origin == 'swat (official names)'
    assert set(report.newly_initialized) == OUTPUT_NORMS and set(state) == set(own) - OUTPUT_NORMS
    assert all(state[name].shape == own[name].shape for name in state)
    assert len(set(report.mapped.values())) == len(state)
    assert {name.split('.')[0] for name in report.dropped} == {'layers', 'norm', 'head'}
    assert not (report.resized or report.split or report.identity_init or report.unknown)


@pytest.mark.parametrize(
    'ours, theirs',
    [
        ('patch_embed.conv1.weight', 'patch_embed.proj21.weight'),
        ('patch_embed.norm1.weight', 'patch_embed.norm2.weight'),
        ('patch_embed.conv2.bias', 'patch_embed.proj22.bias'),
        ('patch_embed.norm2.bias', 'patch_embed.norm.bias'),
        ('layers.0.blocks.0.attn.qkv.conv.weight', 'layers.0.blocks.0.attn.qkv.weight'),
        ('layers.0.blocks.0.attn.qkv.linear.bias', 'layers.0.blocks.0.attn.qkv_linear.bias'),
        ('layers.3.blocks.1.attn.proj.conv.bias', 'layers.3.blocks.1.attn.proj.bias'),
        ('layers.2.blocks.3.attn.proj.weight', 'layers.2.blocks.3.attn.proj.weight'),
        ('layers.2.blocks.3.mlp.dwconv.weight', 'layers.2.blocks.3.mlp.fc3.weight'),
        ('layers.1.downsample.norm.weight', 'layers.1.downsample.norm.weight'),
    ],
)
def test_names(ours, theirs):
    weights = released_swin()
    state, report = convert(weights, 'swat')
    assert report.mapped[ours] == theirs and torch.equal(state[ours], weights[theirs])


def test_layers_of_the_mlp_become_linear():
    state, report = convert(released_swin(), 'swat')
    assert state['layers.0.blocks.0.mlp.fc1.weight'].shape == (384, 96)
    assert state['layers.0.blocks.0.mlp.dwconv.weight'].shape == (384, 1, 5, 5)
    assert not report.resized  # nothing in it has changed


def test_classifier_keeps_its_output_norm():
    weights = released_swin()
    state, report = fit_to(build(SWATSwin, 'tiny', out_indices=(3,)), weights, 'a.pth')
    assert (
        torch.equal(state['norm3.weight'], weights['norm.weight'])
        and report.newly_initialized == []
    )


def test_deit_computes_what_the_release_does(save):
    weights = released_deit()
    model = SWATDeiT('tiny').double().eval()
    report = load_into(model, save(dict(epoch=309, state_dict=weights)))
    assert report.origin == 'swat (official names)' and report.newly_initialized == []
    assert set(report.dropped) == {'head.weight', 'head.bias'}
    row, channel = torch.arange(224.0).double(), torch.arange(3.0).double()
    image = torch.sin(channel[:, None, None] + 0.05 * row[:, None] + 0.03 * row)[None]
    with torch.no_grad():
        tokens = model(image)[0].flatten(2).transpose(1, 2)
    golden = np.load(DATA / 'swat_deit_ti_full_golden.npz')
    torch.testing.assert_close(
        tokens, torch.from_numpy(golden['normed']).double(), atol=1e-5, rtol=1e-5
    )
    logits = tokens.mean(dim=1) @ weights['head.weight'].T + weights['head.bias']
    torch.testing.assert_close(logits, torch.from_numpy(golden['logits']), atol=1e-6, rtol=1e-6)


def test_positions_keep_their_grid():
    weights = released_deit()
    model = build(SWATDeiT, 'tiny', img_size=(320, 512), out_indices=(5,))
    state, report = fit_to(model, weights, 'a.pth')
    assert torch.equal(state['pos_embed'], weights['pos_embed'])
    assert report.grids == dict(pos_embed=(14, 14)) and not report.resized
    assert {'norm.weight', 'norm.bias'} < set(report.dropped)


@pytest.mark.parametrize('kind', [SWATSwin, SWATDeiT])
def test_converted_files_load_too(kind):
    """And into a model with other outputs."""
    weights = released_swin() if kind is SWATSwin else released_deit()
    converted, _ = convert(weights, 'swat')
    assert detect_source(converted) == 'swat'
    state, report = fit_to(build(kind, 'tiny', out_indices=(0,)), converted, 'a.pth')
    assert report.is_ours and not report.identity_init and not report.resized
    assert all(torch.equal(state[name], converted[name]) for name in state)


@pytest.mark.parametrize('stem', ['stem', 'patch_embed'])
@pytest.mark.parametrize('mixer', ['mlp_tokens.fc1', 'linear_tokens'])
def test_mixers_are_refused(stem, mixer, save):
    names = (f'{stem}.proj21.weight', 'blocks.0.norm1.weight', f'blocks.0.{mixer}.weight')
    state = {name: torch.zeros(1) for name in names}
    message = "a Mixer or ResMLP of SWAT, .* for one number of tokens .* SWAT's Swin or DeiT"
    with pytest.raises(ValueError, match=message):
        convert(state, 'swat')
    with pytest.raises(ValueError, match=f'file.pth: .*{message}'):
        load_into(SWATDeiT('tiny'), save(state))


def test_what_differs_is_refused():
    weights = released_swin()
    with pytest.raises(ValueError, match=r'not supported; it has layers\.0\.blocks\.0\.attn\.tau'):
        convert({**weights, 'layers.0.blocks.0.attn.tau': torch.zeros(3)}, 'swat')
    with pytest.raises(ValueError, match=r'read as swat .*other shapes: .*\(169, 3\) instead of'):
        arch = dict(embed_dims=128, depths=(2, 2, 6, 2), num_heads=(4, 8, 16, 32))
        fit_to(build(SWATSwin, arch), weights, 'a.pth')
    with pytest.raises(ValueError, match=r'names it lacks: patch_embed\.norm1\.weight'):
        fit_to(
            build(SWATSwin, 'tiny'),
            {k: v for k, v in weights.items() if k != 'patch_embed.norm2.weight'},
            'a.pth',
        )


def test_dense_twin_does_not_take_structured_blocks():
    with pytest.raises(ValueError, match=r'not have: .*patch_embed\.proj21\.weight'):
        fit_to(build(SWATSwin, 'tiny', structured=False), released_swin(), 'a.pth')


@pytest.mark.parametrize('kind', [SWATSwin, SWATDeiT])
def test_own_names_are_taken_as_they_are(kind, save):
    arch = dict(embed_dims=32, depths=(2, 2, 1, 1), num_heads=(1, 2, 4, 8))
    if kind is SWATDeiT:
        arch = dict(
            embed_dims=64, num_layers=2, num_heads=2, feedforward_channels=64, patch_size=16,
            mlp_kernel=5,
        )  # fmt: skip
    theirs, ours = kind(arch), kind(arch)
    report = load_into(ours, save(theirs.state_dict()))
    assert report.source is None
    assert not (
        report.newly_initialized or report.dropped or report.identity_init or report.resized
    )
    assert all(torch.equal(t, theirs.state_dict()[name]) for name, t in ours.state_dict().items())
