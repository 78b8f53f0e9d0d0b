import pytest
import torch
from mmengine.registry import MODELS

from mmtoken.analysis.library_baseline import library_baseline
from mmtoken.registry import MODELS as OURS

ARCHS = dict(
    STViTRSwin=dict(embed_dims=32, depths=(2, 2, 6, 2), num_heads=(1, 2, 4, 8)),
    STViTDeiT=dict(embed_dims=64, num_layers=8, num_heads=2, feedforward_channels=128),
    DGEDeiT=dict(embed_dims=64, num_layers=4, num_heads=2, feedforward_channels=128),
    MSViT=dict(embed_dims=64, num_layers=4, num_heads=2, feedforward_channels=128),
    SWATSwin=dict(embed_dims=32, depths=(2, 2, 6, 2), num_heads=(1, 2, 4, 8)),
    SWATDeiT=dict(
        embed_dims=64,
        num_layers=4,
        num_heads=2,
        feedforward_channels=128,
        patch_size=16,
        mlp_kernel=5,
    ),
    DGEPVT=dict(
        embed_dims=(32, 64, 128, 256),
        depths=(1, 2, 1, 1),
        num_heads=(1, 2, 4, 8),
        mlp_ratios=(4, 4, 2, 2),
        sr_ratios=(8, 4, 2, 1),
    ),
)


@pytest.mark.parametrize('name', ARCHS)
def test_baselines_have_our_maps_and_nearly_our_parameters(name):
    cfg = dict(type=f'mmtoken.{name}', arch=ARCHS[name])
    twin = OURS.build(cfg | OURS.get(name).twin_args)
    baseline = MODELS.build(library_baseline(cfg))
    twin.eval()
    baseline.eval()
    images = torch.zeros(1, 3, 64, 96)
    assert [m.shape for m in baseline(images)] == [m.shape for m in twin(images)]
    counts = [sum(p.numel() for p in network.parameters()) for network in (baseline, twin)]
    assert counts[0] == pytest.approx(counts[1], rel=0.01)


@pytest.mark.parametrize('name', ['DGEPVT', 'DGEDeiT', 'MSViT', 'SWATDeiT'])
def test_baselines_have_exactly_our_parameters(name):
    cfg = dict(type=f'mmtoken.{name}', arch=ARCHS[name], qkv_bias=True)
    twin = OURS.build(cfg | OURS.get(name).twin_args)
    baseline = MODELS.build(library_baseline(cfg))
    counts = [sum(p.numel() for p in network.parameters()) for network in (baseline, twin)]
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    'changes',
    [
        dict(arch=dict(ARCHS['DGEPVT'], num_heads=(2, 2, 4, 8))),
        dict(out_indices=(3,), out_type='avg_featmap'),
        dict(cls_token=True),
    ],
)
def test_pyramids_that_mmdet_cannot_have(changes):
    cfg = dict(type='mmtoken.DGEPVT', arch=ARCHS['DGEPVT'])
    assert library_baseline(cfg)['embed_dims'] == 32
    assert library_baseline(cfg | changes) is None


def test_plain_vit_computes_what_a_dense_msvit_does():
    cfg = dict(type='mmtoken.MSViT', arch=ARCHS['MSViT'], fine_size=8, coarse_size=16, img_size=64)
    cfg.update(out_indices=[1, 3])
    twin, baseline = OURS.build(cfg | dict(gate=None)).eval(), MODELS.build(library_baseline(cfg))
    baseline.eval()  # returns None
    names = {
        'patch_embed.proj': 'patch_embed.projection', 'blocks.': 'layers.', 'norm1': 'ln1',
        'norm2': 'ln2', 'mlp.fc1': 'ffn.layers.0.0', 'mlp.fc2': 'ffn.layers.1',
    }  # fmt: skip
    state = {}
    for name, value in twin.state_dict().items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        state['ln1' + name[4:] if name.startswith('norm.') else name] = value
    baseline.load_state_dict(state)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for ours, theirs in zip(twin(images), baseline(images), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    'changes',
    [dict(num_registers=4), dict(layer_scale=1e-5), dict(cls_token=False, window_size=4)],
)
def test_mixed_scale_vits_that_mmpretrain_cannot_have(changes):
    cfg = dict(type='mmtoken.MSViT', arch='large', coarse_size=28, fine_size=14)
    baseline = library_baseline(dict(cfg, out_type='tokens'))
    assert (
        baseline['patch_size'] == 14
        and baseline['out_type'] == 'featmap'
        and baseline['with_cls_token']
    )
    assert baseline['arch']['embed_dims'] == 1024
    assert library_baseline(dict(cfg, out_type='cls_token'))['out_type'] == 'cls_token'
    assert library_baseline(cfg | changes) is None


@pytest.mark.parametrize('name', ['DGEDPVT', 'PSViT'])
def test_no_baseline(name):
    assert library_baseline(dict(type=f'mmtoken.{name}')) is None


def test_installed_libraries(monkeypatch):
    cfg = dict(type='mmtoken.STViTRSwin')
    find_spec = 'mmtoken.analysis.library_baseline.find_spec'
    for installed, name in ((('mmdet', 'mmseg'), 'mmdet'), (('mmseg',), 'mmseg')):
        monkeypatch.setattr(find_spec, lambda library, installed=installed: library in installed)
        assert library_baseline(cfg)['type'] == f'{name}.SwinTransformer'
    monkeypatch.setattr(find_spec, lambda library: False)
    assert library_baseline(cfg) is None
