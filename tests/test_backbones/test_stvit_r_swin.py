import json
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import wake

from mmtoken.analysis import count_macs
from mmtoken.backbones import STViTRSwin
from mmtoken.backbones.stvit_r_swin import Form
from mmtoken.layers.stvit import neighborhood
from mmtoken.runtime.reference import reference_path

DATA = Path(__file__).parent.parent / 'data'
SWIN = dict(embed_dims=16, depths=(1, 1, 6, 1), num_heads=(1, 2, 2, 4))


def golden_model(golden, **kwargs):
    """The released model of a golden file, with its weights (less the head)."""
    cfg = json.loads(str(golden['cfg_json']))
    arch = dict(embed_dims=cfg['embed_dim'], depths=cfg['depths'], num_heads=cfg['num_heads'])
    model = STViTRSwin(
        arch,
        mlp_ratio=cfg.get('mlp_ratio', 4.0),
        conv_pos=cfg['use_conv_pos'],
        window_size=cfg['window_size'],
        **kwargs,
    )
    weights = {
        name.removeprefix('sd/'): torch.from_numpy(golden[name])
        for name in golden.files
        if name.startswith('sd/') and not name.startswith('sd/head.')
    }
    if 'sd/norm.weight' in golden.files:  # a classifier's only output norm
        weights |= {f'norm3.{k}': weights.pop(f'norm.{k}') for k in ('weight', 'bias')}
    keys = model.load_state_dict(weights, strict=False)
    assert not keys.unexpected_keys
    assert all(k.endswith('num_batches_tracked') for k in keys.missing_keys)
    return model.eval()


@pytest.mark.parametrize('path', sorted(DATA.glob('stvit_det_*.npz')), ids=lambda path: path.stem)
@pytest.mark.parametrize('path_taken', ['fast', 'reference', 'training'])
def test_equals_the_released_detection_backbone(path, path_taken):
    golden = np.load(path)
    cfg = json.loads(str(golden['cfg_json']))
    model = golden_model(
        golden,
        semantic_size=cfg['window_sample_size'],
        key_sizes=(
            cfg['k_window_size_1'], cfg['k_window_size_2'], cfg['restore_k_window_size'],
        ),
        pad_mask='released' if cfg['pad_mask'] else None,
    )  # fmt: skip
    contexts = dict(fast=torch.no_grad, reference=reference_path, training=torch.enable_grad)
    with contexts[path_taken]():
        maps = model(torch.from_numpy(golden['input']))
    for i, map_ in enumerate(maps):
        expected = torch.from_numpy(golden[f'out{i}'])
        torch.testing.assert_close(map_, expected, atol=1e-4, rtol=1e-4)


def test_equals_the_released_classifier():
    golden = np.load(DATA / 'stvit_cls_a_noshortcut.npz')
    model = golden_model(golden, form='classification', out_indices=(3,))
    with torch.no_grad():
        stage = torch.from_numpy(golden['stage3_in']).view(2, 14, 14, -1)
        stage = model.layers[2].downsample(model.layers[2](stage)).flatten(1, 2)
        features = model(torch.from_numpy(golden['input']))[0].mean((2, 3))
    head = [torch.from_numpy(golden[f'sd/head.{k}']) for k in ('weight', 'bias')]
    for actual, name in (
        (stage, 'stage3_out_after_merge'),
        (features, 'features'),
        (F.linear(features, *head), 'logits'),
    ):
        torch.testing.assert_close(actual, torch.from_numpy(golden[name]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('form', ['dense', 'classification'])
@pytest.mark.parametrize('semantic_size', [3, None])
@pytest.mark.parametrize('size', [(224, 224), (330, 470), (1024, 1056)])
def test_fast_path_equals_reference(form, semantic_size, size):
    """The last grid is wider than nine windows on both axes, more than the recovery reaches."""
    model = STViTRSwin(SWIN, form, semantic_size=semantic_size, pad_mask='exact').double().eval()
    wake(model)
    image = torch.randn(1, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        fast = model(image)
        with reference_path():
            reference = model(image)
    for a, b in zip(fast, reference, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(
    'arch, form, count',
    [
        ('small', 'dense', 48_857_862),
        ('base', 'dense', 86_789_128),
        ('small', 'classification', 49_625_518),
        ('base', 'classification', 87_812_336),
    ],
)
def test_parameters_as_released(arch, form, count):
    dense = form == 'dense'
    with torch.device('meta'):
        model = STViTRSwin(arch, form, out_indices=range(4) if dense else [3])
        head = torch.nn.Linear(model.out_channels[-1], 1000)
    modules = [model] if dense else [model, head]
    assert sum(p.numel() for m in modules for p in m.parameters()) == count


def test_macs_as_published():
    """135.5 G, each key and value projected once, padding included."""
    with torch.device('meta'), reference_path():
        macs = count_macs(STViTRSwin('small').eval(), torch.zeros(1, 3, 800, 1280))
    assert macs / 135.5e9 == pytest.approx(1, abs=0.02)


def test_forms_share_their_parameters():
    shapes = [
        {k: v.shape for k, v in STViTRSwin(SWIN, form, use_global=True).state_dict().items()}
        for form in ('dense', 'classification')
    ]
    assert shapes[0] == shapes[1] and 'layers.2.semantic_token2' in shapes[0]


def test_classifiers_do_not_shift_small_grids():
    """As in Swin, where a detector does."""
    image = torch.randn(1, 3, 224, 224)
    arch = dict(embed_dims=8, depths=(2, 1, 1, 2), num_heads=(1, 1, 1, 1))
    dense, classifier = (STViTRSwin(arch, f, semantic_size=None).eval() for f in get_args(Form))
    wake(dense)
    classifier.load_state_dict(dense.state_dict())
    with torch.no_grad():
        for i, (a, b) in enumerate(zip(dense(image), classifier(image), strict=True)):
            assert torch.allclose(a, b, atol=1e-5) == (i < 3)


def test_tokens_are_saved():
    """What the method is for: fewer multiply-accumulates than the dense twin."""
    image = torch.zeros(1, 3, 448, 672)
    sparse, dense = (
        count_macs(STViTRSwin('tiny', semantic_size=size).eval(), image) for size in (3, None)
    )
    assert sparse < 0.85 * dense


def test_exact_mask_ignores_what_lies_in_the_padding():
    """Poisoned padding must not change the maps; with the released mask it may."""
    original = neighborhood.neighborhood_attention

    def poisoned(query, key_value, *args, **kwargs):
        key_value = torch.cat([key_value[:, :-1], key_value[:, -1:] + 100], dim=1)
        return original(query, key_value, *args, **kwargs)

    image = torch.randn(1, 3, 150, 230)  # third stage: 10 x 15 tokens, windows of 7
    for pad_mask, equal in (('exact', True), ('released', False), (None, False)):
        torch.manual_seed(0)
        model = STViTRSwin(SWIN, pad_mask=pad_mask).eval()
        wake(model)
        with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
            clean = model(image)[2]
            patch.setattr(neighborhood, 'neighborhood_attention', poisoned)
            assert torch.allclose(model(image)[2], clean, atol=1e-5) == equal, pad_mask


def test_starts_from_a_classifier_of_our_own(tmp_path):
    source = STViTRSwin(SWIN, form='classification', out_indices=[3]).state_dict()
    torch.save(dict(state_dict={f'backbone.{k}': v + 1 for k, v in source.items()}), tmp_path / 'a')
    model = STViTRSwin(SWIN, init_cfg=dict(type='Pretrained', checkpoint=tmp_path / 'a'))
    model.init_weights()
    for name, value in model.state_dict().items():
        if name in source:
            assert torch.equal(value, source[name] + 1)
        else:
            assert name.startswith(('norm0', 'norm1', 'norm2'))


@pytest.mark.parametrize(
    'bad, message',
    [
        (dict(arch={**SWIN, 'depths': (1, 1, 7, 1)}), 'multiple of 6'),
        (dict(arch={**SWIN, 'depths': (1, 1, 6)}), 'one number a stage'),
        (dict(arch=dict(embed_dims=8, depths=(1, 6), num_heads=(1, 1))), 'must be a third depth'),
        (
            dict(arch={**SWIN, 'num_heads': (1, 2, 3, 4)}),
            'stage 2: embed_dims=64 is no multiple of num_heads=3',
        ),
        (dict(arch=SWIN, semantic_size=8), 'from 1 to window_size=7'),
        (dict(arch=SWIN, key_sizes=(14, 21)), 'three sides'),
        (dict(arch=SWIN, key_sizes=(14, 5, 27)), 'no smaller than'),
        (dict(arch=SWIN, pad_mask='exakt'), "'released', 'exact' or None"),
        (dict(arch=SWIN, form='cls'), "'dense' or 'classification', got 'cls'"),
        (dict(arch=SWIN, stem='vit'), "'conv' or 'patch', got 'vit'"),
        (dict(arch=SWIN, shortcut=False), 'always has the shortcut'),
    ],
)
def test_bad_arguments(bad, message):
    with pytest.raises(ValueError, match=message):
        STViTRSwin(**bad)


@pytest.mark.parametrize('form', get_args(Form))
def test_three_stages(form):
    arch = dict(embed_dims=8, depths=(1, 1, 6), num_heads=(1, 1, 2))
    model = STViTRSwin(arch, form, out_indices=(1, 2)).eval()
    with torch.no_grad():
        maps = model(torch.randn(1, 3, 100, 130))
    assert [m.shape for m in maps] == [(1, 16, 13, 17), (1, 32, 7, 9)]


def test_compiles():
    """Plans stay outside the graphs; what is in them gives the same maps."""
    model, image = STViTRSwin(SWIN).eval(), torch.randn(1, 3, 64, 96)
    wake(model)
    with torch.no_grad():
        compiled = torch.compile(model, backend='eager')(image)
        torch.testing.assert_close(compiled, model(image))
