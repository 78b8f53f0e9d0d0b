"""Released files of STViT-R, by their names and shapes."""

import csv

import pytest
import torch

from mmtoken.backbones import STViTRSwin
from mmtoken.checkpoints import convert, detect_source, find_weights, fit_to, read_checkpoint

from ..conftest import TABLE, official_weights

OUTPUT_NORMS = {f'norm{i}.{kind}' for i in range(4) for kind in ('weight', 'bias')}


def build(arch, **kwargs):
    with torch.device('meta'):
        return STViTRSwin(arch, **kwargs)


@pytest.mark.parametrize('size', ['small', 'base'])
@pytest.mark.parametrize('task', ['cls', 'det'])
def test_backbones_take_released_files(size, task, official_checkpoint):
    file = official_checkpoint(size, task)
    weights = find_weights(read_checkpoint(file), file)
    assert detect_source(weights) == 'stvit-r'
    model = build(size)
    state, report = fit_to(model, weights, file)

    own = model.state_dict()
    official = official_weights(size, task)
    assert set(report.newly_initialized) == (OUTPUT_NORMS if task == 'cls' else set())
    assert set(state) == set(own) - set(report.newly_initialized)
    for name, tensor in state.items():
        assert torch.equal(tensor, official[name]) and tensor.shape == own[name].shape
    dropped = {name.split('.')[0] for name in report.dropped if not name.startswith('layers.')}
    assert dropped == ({'norm', 'head'} if task == 'cls' else {'neck', 'roi_head'})
    in_layers = {name.split('.')[-1] for name in report.dropped if name.startswith('layers.')}
    assert in_layers == {'relative_position_index'} | ({'attn_mask'} if task == 'cls' else set())
    assert report.origin == 'stvit-r (official names)'
    assert not report.resized and not report.split and not report.unknown


@pytest.mark.parametrize('size', ['small', 'base'])
@pytest.mark.parametrize('task', ['cls', 'det'])
def test_convert(size, task, official_checkpoint):
    file = official_checkpoint(size, task)
    weights = find_weights(read_checkpoint(file), file)
    state, report = convert(weights, 'stvit-r')
    with TABLE.open() as stream:
        kept = {
            row['name']
            for row in csv.DictReader(stream, delimiter='\t')
            if row['file'] in ('both', task)
            and not row['name'].startswith('head.')
            and not row['name'].endswith(('attn_mask', 'relative_position_index'))
        }
    assert set(state) == set(report.mapped) == kept
    assert report.source == 'stvit-r' and report.layout == 'official'
    assert len(report.mapped) + len(report.dropped) == len(weights)


def test_classifier_keeps_its_output_norm(official_checkpoint):
    file = official_checkpoint('small', 'cls')
    model = build('small', form='classification', out_indices=(3,))
    state, report = fit_to(model, find_weights(read_checkpoint(file), file), file)
    assert torch.equal(state['norm3.weight'], official_weights('small', 'cls')['norm.weight'])
    assert report.mapped['norm3.bias'] == 'norm.bias' and report.newly_initialized == []


def test_some_maps_of_a_detector(official_checkpoint):
    file = official_checkpoint('small', 'det')
    weights = find_weights(read_checkpoint(file), file)
    _, report = fit_to(build('small', out_indices=(1, 2)), weights, file)
    dropped = {name for name in report.dropped if name.startswith('norm')}
    assert dropped == {f'norm{i}.{kind}' for i in (0, 3) for kind in ('weight', 'bias')}


@pytest.mark.parametrize(
    'name, tensor, message',
    [
        ('layers.2.blocks.7.layer_scale_1', None, 'it lacks: layers.2.blocks.7.layer_scale_1'),
        ('patch_embed.proj.0.c.weight', None, 'it lacks: patch_embed.proj.0.c.weight'),
        ('layers.2.gate', torch.zeros(1), 'it should not have: layers.2.gate'),
        ('norm0.bias', torch.zeros(2), 'other shapes: norm0.bias (2,) instead of (96,)'),
    ],
)
def test_what_differs_is_refused(name, tensor, message):
    weights = official_weights('small', 'det')
    weights[name] = tensor
    if tensor is None:
        del weights[name]
    with pytest.raises(ValueError) as caught:
        fit_to(build('small'), weights, 'a.pth')
    assert str(caught.value).startswith('a.pth: does not fit STViTRSwin; it was read as stvit-r')
    assert message in str(caught.value)


def test_other_size_is_refused():
    with pytest.raises(ValueError, match=r'stvit-r .*other shapes: .*and \d+ more'):
        fit_to(build('base'), official_weights('small', 'det'), 'a.pth', source='stvit-r')


def test_dense_twin_does_not_take_semantic_blocks():
    with pytest.raises(ValueError, match=r'read as stvit-r .*not have: .*attn\.q\.weight'):
        fit_to(build('small', semantic_size=None), official_weights('small', 'det'), 'a.pth')


def test_semantic_tokens_are_not_declared_new():
    """Only what a file cannot have is fresh: the released ones have no centers."""
    with pytest.raises(ValueError, match=r'names it lacks: layers\.2\.semantic_token2'):
        fit_to(build('small', use_global=True), official_weights('small', 'det'), 'a.pth')
