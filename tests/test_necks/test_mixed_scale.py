import pytest
import torch
from helpers import model_of
from mmengine.config import ConfigDict
from mmengine.registry import MODELS
from torch import nn

import mmtoken
from mmtoken.backbones import MSViT, STViTDeiT
from mmtoken.necks import MixedScaleNeck, SimpleFeaturePyramid
from mmtoken.necks import mixed_scale as neck_module

ARCH = dict(embed_dims=16, num_layers=4, num_heads=2, feedforward_channels=32)
GATE = dict(loss=None, start_ratio=0.5, hidden_channels=8)
BACKBONE = dict(arch=ARCH, gate=GATE, img_size=64)
VARIANTS = dict(
    plain={},
    no_class=dict(cls_token=False),
    registers=dict(num_registers=2, coarse_size=48),
    windows=dict(cls_token=False, window_size=2, global_blocks=(1,)),
)


def make_backbone(**kwargs):
    torch.manual_seed(1)
    backbone = MSViT(**{**BACKBONE, **kwargs})
    for name, parameter in backbone.named_parameters():
        if name.startswith('gate.layers'):
            nn.init.normal_(parameter, std=1.0)  # so that regions differ in what they choose
    return backbone


def wake(neck):
    """Let refinements be no identities any more."""
    for refine in neck.refine:
        nn.init.normal_(refine.proj.weight, std=0.5)
    return neck


def run(backbone, images, maps_of):
    """Maps, and in training the gradients of all parameters."""
    torch.manual_seed(2)
    maps = maps_of(backbone(images))
    if not backbone.training:
        return maps, {}
    torch.manual_seed(3)
    sum((m * torch.randn_like(m)).sum() for m in maps).backward()
    return maps, {name: p.grad for name, p in backbone.named_parameters()}


@pytest.mark.parametrize('size', [(64, 96), (75, 50)])
@pytest.mark.parametrize('mode', ['eval', 'gathered', 'masked'])
@pytest.mark.parametrize('variant', VARIANTS)
def test_restoring_in_the_neck_equals_restoring_in_the_backbone(variant, mode, size):
    kwargs = dict(VARIANTS[variant], out_indices=(1, 3))
    if mode != 'eval':
        kwargs['train_mode'] = mode
    inner = make_backbone(**kwargs).train(mode != 'eval')
    outer = make_backbone(**kwargs, out_type='tokens').train(mode != 'eval')
    neck = MixedScaleNeck(16)
    images = torch.randn(2, 3, *size)
    expected, their_grads = run(inner, images, list)
    maps, grads = run(outer, images, lambda taps: [neck.restore(0, tap) for tap in taps])
    for ours, theirs in zip(maps, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
        assert ours.is_contiguous()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, their_grads[name], msg=name)
        assert grad.isfinite().all(), name


@pytest.mark.parametrize('multi_level', [False, True])
def test_pyramid_of_restored_maps(multi_level):
    indices = (0, 1, 2, 3)
    maps = make_backbone(out_indices=indices).eval()
    tokens = make_backbone(out_indices=indices, out_type='tokens').eval()
    neck = MixedScaleNeck(16, out_channels=8, multi_level=multi_level).eval()
    pyramid = SimpleFeaturePyramid(16, out_channels=8, multi_level=multi_level).eval()
    pyramid.load_state_dict(neck.state_dict())
    images = torch.randn(2, 3, 75, 50)
    with torch.no_grad():
        outs = neck(tokens(images))
        for ours, theirs in zip(outs, pyramid(maps(images)), strict=True):
            torch.testing.assert_close(ours, theirs)
            assert ours.is_contiguous()
    assert [tuple(o.shape[2:]) for o in outs] == [(20, 16), (10, 8), (5, 4), (3, 2), (2, 1)]


@pytest.mark.parametrize('multi_level, restored', [(False, [3]), (True, [0, 1, 2, 3])])
def test_only_taps_in_use_are_restored(monkeypatch, multi_level, restored):
    taps = make_backbone(out_indices=(0, 1, 2, 3), out_type='tokens')(torch.randn(1, 3, 64, 64))
    seen, restore = [], neck_module.restore_features

    def watched(features):
        seen.append(next(i for i, tap in enumerate(taps) if tap is features))
        return restore(features)

    monkeypatch.setattr(neck_module, 'restore_features', watched)
    MixedScaleNeck(16, multi_level=multi_level)(taps)
    assert seen == restored


def test_stride_8():
    backbone = make_backbone(
        fine_size=8, coarse_size=16, out_indices=(1, 2, 3), out_type='tokens'
    ).eval()
    neck = MixedScaleNeck(16, True, 8, num_outs=4, multi_level=True, scales=(2, 1, 0.5))
    outs = neck(backbone(torch.randn(1, 3, 64, 96)))
    assert [tuple(o.shape[2:]) for o in outs] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    assert len(neck.refine) == 3


@pytest.mark.parametrize('multi_level', [False, True])
def test_refinement_starts_as_the_identity(multi_level):
    taps = make_backbone(out_indices=(0, 1, 2, 3), out_type='tokens').eval()(
        torch.randn(2, 3, 64, 96)
    )
    neck = MixedScaleNeck(16, refine=True, out_channels=8, multi_level=multi_level).eval()
    plain = MixedScaleNeck(16, out_channels=8, multi_level=multi_level).eval()
    assert len(neck.refine) == neck.num_taps and plain.refine is None
    neck.init_weights()
    missing, unexpected = plain.load_state_dict(neck.state_dict(), strict=False)
    assert not missing and all(name.startswith('refine.') for name in unexpected)
    for ours, theirs in zip(neck(taps), plain(taps), strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(wake(neck)(taps), plain(taps), strict=True):
        assert not torch.allclose(ours, theirs) and ours.is_contiguous()


def test_refinement_is_loaded_from_a_checkpoint(tmp_path):
    trained = wake(MixedScaleNeck(16, refine=True))
    torch.save(trained.state_dict(), tmp_path / 'neck.pth')
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'neck.pth'))
    neck = MixedScaleNeck(16, refine=True, init_cfg=init_cfg)
    neck.init_weights()
    for name, value in trained.state_dict().items():
        assert torch.equal(neck.state_dict()[name], value), name


def test_refinement_sees_where_it_was_coarse():
    (tap,) = make_backbone(out_type='tokens').eval()(torch.randn(1, 3, 64, 64))
    owner, coarse = tap.layout.unbind(1)
    assert 0 < coarse.sum() < coarse.numel()
    other = tap._replace(layout=torch.stack([owner, 1 - coarse], dim=1))
    neck = wake(MixedScaleNeck(16, refine=True))
    assert not torch.allclose(neck.restore(0, tap), neck.restore(0, other))


@pytest.mark.parametrize('train_mode', ['masked', 'gathered'])
def test_gradients_reach_every_parameter(train_mode):
    backbone = make_backbone(train_mode=train_mode, out_indices=(0, 1, 2, 3), out_type='tokens')
    neck = MixedScaleNeck(16, refine=True, out_channels=8, multi_level=True)
    neck.init_weights()
    wake(neck)
    outs = neck(backbone(torch.randn(2, 3, 75, 50)))
    sum((out * torch.randn_like(out)).sum() for out in outs).backward()
    for name, parameter in [*backbone.named_parameters(), *neck.named_parameters()]:
        assert parameter.grad is not None, name
        if not name.endswith('qkv.bias'):
            assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize('refine', [False, True])
def test_fine_everywhere_is_the_dense_twin(refine):
    cfg = ConfigDict(
        backbone=dict(
            BACKBONE, type='mmtoken.MSViT', out_type='tokens', out_indices=(1, 2, 3), fine_size=8
        ),
        neck=dict(
            type='mmtoken.MixedScaleNeck', in_channels=16, refine=refine, out_channels=8,
            num_outs=4, multi_level=True, norm='BN', scales=(2, 1, 0.5),
        ),
    )  # fmt: skip
    twin = mmtoken.dense_twin(cfg)
    assert twin.neck.type == 'mmtoken.SimpleFeaturePyramid' and 'refine' not in twin.neck
    assert twin.backbone.out_type == 'map' and twin.backbone.gate is None
    parts, twins = ([MODELS.build(c[k]).eval() for k in ('backbone', 'neck')] for c in (cfg, twin))
    assert type(twins[1]) is SimpleFeaturePyramid
    for part, dense in zip(parts, twins, strict=True):
        missing, unexpected = dense.load_state_dict(part.state_dict(), strict=False)
        assert not missing and all(name.startswith(('gate.', 'refine.')) for name in unexpected)
    images = torch.randn(2, 3, 75, 50)
    with torch.no_grad(), mmtoken.routing_override(coarse_ratio=0.0):
        outs = parts[1](parts[0](images))
        for ours, theirs in zip(outs, twins[1](twins[0](images)), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    with torch.no_grad(), mmtoken.routing_override(coarse_ratio=1.0):
        assert not torch.allclose(parts[1](parts[0](images))[0], outs[0])


def test_bad_inputs():
    images = torch.randn(1, 3, 64, 64)
    with pytest.raises(
        TypeError, match=r'MixedScaleNeck takes .* got Tensor; for maps use mmtoken'
    ):
        MixedScaleNeck(16)(make_backbone().eval()(images))
    taps = make_backbone(out_indices=(2, 3), out_type='tokens').eval()(images)
    with pytest.raises(ValueError, match='takes 4 maps, got 2'):
        MixedScaleNeck(16, multi_level=True)(taps)
    with pytest.raises(TypeError, match='SimpleFeaturePyramid takes maps, got SparseFeatures'):
        SimpleFeaturePyramid(16)(taps)
    tokens = STViTDeiT(arch=ARCH, base_layers=2, img_size=64, out_type='tokens')(images)
    with pytest.raises(ValueError, match=r'no layout, .* for mmtoken\.SemanticRecoveryNeck'):
        MixedScaleNeck(16)(tokens)
    with pytest.raises(ValueError, match='in_channels must be a multiple of 4'):
        MixedScaleNeck(18)


@pytest.mark.parametrize('library', ['mmdet', 'mmseg'])
def test_in_models_of_the_libraries(library):
    cfg = model_of(
        library,
        backbone=dict(
            type='mmtoken.MSViT', arch=ARCH, img_size=64, out_indices=(0, 1, 2, 3),
            out_type='tokens',
        ),
        neck=dict(
            type='mmtoken.MixedScaleNeck', in_channels=16, refine=True, out_channels=16,
            num_outs=4, multi_level=True,
        ),
    )  # fmt: skip
    shapes = [(1, 16, 16, 24), (1, 16, 8, 12), (1, 16, 4, 6), (1, 16, 2, 3)]
    images = torch.randn(1, 3, 64, 96)
    network = MODELS.build(cfg)
    network.init_weights()
    assert all(not refine.proj.weight.any() for refine in network.neck.refine)
    with mmtoken.token_losses() as published:
        features = network.extract_feat(images)
    assert [tuple(f.shape) for f in features] == shapes
    assert 'loss_gate' in published
    twin = MODELS.build(mmtoken.dense_twin(cfg))
    assert type(twin.neck) is SimpleFeaturePyramid
    assert [tuple(f.shape) for f in twin.extract_feat(images)] == shapes
