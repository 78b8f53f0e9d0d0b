import pytest
import torch
from helpers import randomize
from mmengine.registry import MODELS as MMENGINE_MODELS

from mmtoken.analysis import dense_twin
from mmtoken.backbones import MSViT, STViTDeiT
from mmtoken.necks import SemanticRecoveryNeck, SimpleFeaturePyramid

VIT = dict(embed_dims=16, num_layers=6, num_heads=2, feedforward_channels=64)
BACKBONE = dict(arch=VIT, base_layers=2, img_size=64)


@pytest.mark.parametrize('size', [(64, 64), (100, 50)])
@pytest.mark.parametrize(
    'out_indices, neck_args',
    [
        ((5,), {}),
        ((1,), dict(dense_taps=1)),
        ((1, 3, 4, 5), dict(multi_level=True, dense_taps=1)),
        ((2, 3, 4, 5), dict(multi_level=True, recovery_scale=0.1)),
        ((1, 3, 5), dict(multi_level=True, dense_taps=1, scales=(2, 1, 0.5))),
    ],
)
def test_restoring_in_the_neck_equals_restoring_in_the_backbone(size, out_indices, neck_args):
    neck = randomize(SemanticRecoveryNeck(16, num_heads=2, out_channels=8, **neck_args)).eval()
    scale = neck_args.get('recovery_scale')
    inner = STViTDeiT(**BACKBONE, out_indices=out_indices, recovery_scale=scale)
    inner = randomize(inner).eval()
    outer = STViTDeiT(**BACKBONE, out_indices=out_indices, out_type='tokens').eval()
    outer.load_state_dict(inner.state_dict(), strict=False)
    for ours, theirs in zip(neck.recover, inner.recover.values(), strict=True):
        ours.load_state_dict(theirs.state_dict())
    pyramid_args = {k: v for k, v in neck_args.items() if k in ('multi_level', 'scales')}
    pyramid = SimpleFeaturePyramid(16, out_channels=8, **pyramid_args).eval()
    pyramid.load_state_dict(neck.state_dict(), strict=False)
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        maps, taps = inner(images), outer(images)
        for i, (map_, tap) in enumerate(zip(maps, taps, strict=True)):
            torch.testing.assert_close(neck.restore(i, tap), map_)
        for ours, theirs in zip(neck(taps), pyramid(maps), strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize('rotary', ['dinov3', 'eva02'])
def test_restoring_on_later_trunks(rotary):
    options = dict(mlp='swiglu-norm', norm_eps=1e-4, qk_norm=True, rotary=rotary)
    args = dict(BACKBONE, arch=dict(VIT, **options), cls_token=True, num_registers=2)
    args.update(out_indices=(1, 3, 4, 5), semantic_size=3)
    neck = SemanticRecoveryNeck(
        16, num_heads=2, multi_level=True, dense_taps=1, semantic_size=3, **options
    )
    neck, inner = randomize(neck).eval(), randomize(STViTDeiT(**args)).eval()
    outer = STViTDeiT(**args, out_type='tokens').eval()
    outer.load_state_dict(inner.state_dict(), strict=False)
    for ours, theirs in zip(neck.recover, inner.recover.values(), strict=True):
        ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 100, 50)
    with torch.no_grad():
        for i, (map_, tap) in enumerate(zip(inner(images), outer(images), strict=True)):
            torch.testing.assert_close(neck.restore(i, tap), map_)
    neck.semantic_size = 4
    with pytest.raises(ValueError, match='there are 6 semantic .* not agree with semantic_size=4'):
        neck.restore(1, outer(images)[1])


def test_gradients_reach_every_parameter():
    backbone = STViTDeiT(**BACKBONE, out_indices=(1, 3, 4, 5), out_type='tokens')
    neck = SemanticRecoveryNeck(16, num_heads=2, dense_taps=1, multi_level=True)
    neck.init_weights()
    outs = neck(backbone(torch.randn(2, 3, 64, 64)))
    sum((out * torch.randn_like(out)).sum() for out in outs).backward()
    for name, parameter in [*backbone.named_parameters(), *neck.named_parameters()]:
        assert parameter.grad is not None, name
        if not name.endswith(('kv.bias', 'qkv.bias')):
            assert parameter.grad.abs().sum() > 0, name


def test_twin_is_built_from_the_remaining_arguments():
    cfg = dict(type='mmtoken.SemanticRecoveryNeck', in_channels=16, num_heads=2, num_outs=4)
    cfg.update(dense_taps=0, mlp_ratio=4.0, qkv_bias=True, recovery_scale=None, norm='BN')
    neck = MMENGINE_MODELS.build(cfg)
    assert isinstance(neck, SemanticRecoveryNeck)
    backbone = dict(type='mmtoken.STViTDeiT', arch='tiny', out_type='tokens')
    twin = MMENGINE_MODELS.build(dense_twin(dict(backbone=backbone, neck=cfg))['neck'])
    assert type(twin) is SimpleFeaturePyramid
    assert set(twin.state_dict()) <= set(neck.state_dict())


@pytest.mark.parametrize(
    'bad, message',
    [
        (dict(num_heads=3), 'no multiple of num_heads=3'),
        (dict(dense_taps=2), 'from 0 to 1, the taps in use, got 2'),
        (dict(dense_taps=5, multi_level=True), 'from 0 to 4'),
        (dict(dense_taps=4, multi_level=True, scales=(2, 1, 0.5)), 'from 0 to 3'),
        (dict(mlp='relu'), "mlp must be one of .*swiglu.*got 'relu'"),
        (dict(rotary='rope'), "rotary must be one of .*dinov3.*got 'rope'"),
        (dict(rotary='dinov3', num_heads=8), 'a multiple of 4 channels in each head, got 16'),
    ],
)
def test_bad_arguments(bad, message):
    with pytest.raises(ValueError, match=message):
        SemanticRecoveryNeck(**{'in_channels': 16, 'num_heads': 2, **bad})


def test_bad_inputs():
    with pytest.raises(TypeError, match=r'got Tensor; for maps use mmtoken\.SimpleFeaturePyramid'):
        SemanticRecoveryNeck(16, num_heads=2)([torch.randn(1, 16, 4, 4)])
    image = torch.randn(1, 3, 64, 64)
    backbone = STViTDeiT(**BACKBONE, out_type='tokens', semantic_size=None)
    with pytest.raises(ValueError, match='tap 0 has 0 semantic tokens an image'):
        SemanticRecoveryNeck(16, num_heads=2)(backbone(image))
    with pytest.raises(ValueError, match='takes 4 maps, got 1'):
        SemanticRecoveryNeck(16, num_heads=2, dense_taps=4, multi_level=True)(backbone(image))
    mixed = MSViT(VIT, gate=dict(loss=None), img_size=64, out_type='tokens')
    with pytest.raises(ValueError, match=r'has a layout, .* for mmtoken\.MixedScaleNeck'):
        SemanticRecoveryNeck(16, num_heads=2)(mixed(image))
