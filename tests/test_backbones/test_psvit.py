import pytest
import torch
from mmengine.registry import MODELS

from mmtoken.analysis.macs import count_macs
from mmtoken.analysis.twin import dense_twin
from mmtoken.backbones.psvit import PSViT
from mmtoken.runtime.reference import reference_path

STAGES = [(32, 2, (2,)), (48, 3, (2, 1, 2)), (64, 4, (1, 3))]
IMAGE = (72, 88)


def make(stages=STAGES, **kwargs):
    kwargs = dict(dict(img_size=80, window_sizes=(4, None, None)), **kwargs)
    model = PSViT(dict(stages=stages), **kwargs)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.add_(torch.empty_like(parameter).uniform_(-0.1, 0.3, generator=generator))
    return model.eval()


def macs_by_hand(stages, grid, window, kernel=3, in_values=192):
    """Projections, MLPs, maps and their products, pooling and patches."""
    height, width = grid
    total = height * width * in_values * stages[0][0]
    for i, (dims, _, groups) in enumerate(stages):
        if i:
            total += height * width * stages[i - 1][0] * dims * kernel**2
            height, width = -(-height // 2), -(-width // 2)
        tokens = height * width
        pairs = tokens**2
        if i == 0 and window is not None:
            sides = [
                [window] * (side // window) + [side % window] * (side % window > 0)
                for side in (height, width)
            ]
            pairs = sum((a * b) ** 2 for a in sides[0] for b in sides[1])
        for size in groups:
            owner = 12 * tokens * dims**2 + 2 * pairs * dims
            sharer = 10 * tokens * dims**2 + pairs * dims
            total += owner + (size - 1) * sharer
    return total


def test_macs_are_those_counted_by_hand():
    with reference_path():
        counted = count_macs(make(), torch.randn(1, 3, *IMAGE))
    assert counted == macs_by_hand(STAGES, (9, 11), 4)


def test_macs_of_the_twin():
    dense = [(dims, heads, (1,) * sum(groups)) for dims, heads, groups in STAGES]
    image = torch.randn(1, 3, *IMAGE)
    with reference_path():
        assert count_macs(make(sharing=None), image) == macs_by_hand(dense, (9, 11), 4)
        assert count_macs(make(dense), image) == macs_by_hand(dense, (9, 11), 4)


@pytest.mark.parametrize('arch, macs, parameters', [('tiny', 1.344, 10.1), ('small', 5.117, 40.1)])
def test_zoo(arch, macs, parameters):
    model = PSViT(arch, out_indices=(2,)).eval()
    stages = PSViT.resolve_arch(arch)['stages']
    assert macs_by_hand(stages, (28, 28), 14) / 1e9 == pytest.approx(macs, abs=1e-3)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(parameters, abs=0.1)


def test_backbone_equals_its_reference():
    model, image = make(), torch.randn(2, 3, *IMAGE)
    with torch.no_grad():
        with reference_path():
            expected = model(image)
        torch.testing.assert_close(model(image), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('off', [None, False])
def test_sharing_is_switched_off(off):
    assert [stage.groups for stage in make(sharing=off).layers] == [(1,) * 2, (1,) * 5, (1,) * 4]


def test_twin_computes_every_map():
    cfg = dict(type='mmtoken.PSViT', arch=dict(stages=STAGES), window_sizes=(4, None, None))
    twin = MODELS.build(dense_twin(cfg))
    assert all(hasattr(b.attn, 'qkv') for stage in twin.layers for b in stage.blocks)
    assert [len(stage.blocks) for stage in twin.layers] == [2, 5, 4]
    sharing = MODELS.build(cfg)
    followers = [hasattr(b.attn, 'v') for stage in sharing.layers for b in stage.blocks]
    assert followers == [0, 1, 0, 1, 0, 0, 1, 0, 0, 1, 1]


def test_weights_of_the_twin_warm_start():
    twin, model = make(sharing=None), make()
    model.load_state_dict(twin.state_dict(), strict=True)
    own, dense = model.layers[1].blocks[1].attn, twin.layers[1].blocks[1].attn
    assert torch.equal(own.v.weight, dense.qkv.weight[96:])
    assert torch.equal(own.v.bias, dense.qkv.bias[96:])


@pytest.mark.parametrize('size', [(64, 80), (61, 75), (9, 1)])
def test_finest_map(size):
    """Two by two places for each token of the first map, cropped to the image."""
    model = make(finest_map=True)
    with torch.no_grad():
        finest, first, *_ = model(torch.randn(1, 3, *size))
        assert model.out_channels == (32, 32, 48, 64)
        assert model.feature_info.reduction() == [4, 8, 16, 32]
        assert finest.shape == (1, 32, *(-(-side // 4) for side in size))
        assert finest.is_contiguous()
        corner = torch.einsum('c,cd->d', first[0, :, 0, 0], model.finest.weight[:, :, 0, 0])
    torch.testing.assert_close(finest[0, :, 0, 0], corner + model.finest.bias)


def test_finest_map_is_frozen_with_its_stage():
    model = make(finest_map=True, frozen_stages=1)
    assert not any(p.requires_grad for p in model.finest.parameters())
    assert all(p.requires_grad for p in make(finest_map=True, frozen_stages=0).finest.parameters())
    assert model.get_layer_depth('finest.weight') == (12, 13)


def test_norms_exist_only_where_used():
    names = [n for n, _ in make(out_indices=(0, 2)).named_parameters() if n.startswith('norm')]
    assert names == ['norm0.weight', 'norm0.bias', 'norm2.weight', 'norm2.bias']


@pytest.mark.parametrize(
    'kwargs, message',
    [
        (dict(sharing='map'), "True, False or None, got 'map'"),
        (dict(window_sizes=(4, None)), r'each of 3 stages, got \(4, None\)'),
        (dict(window_sizes=(4, 0, None)), r'each of 3 stages, got \(4, 0, None\)'),
        (dict(pooling='min'), "'conv'.*got 'min'"),
        (dict(stages=[]), 'no stages'),
        (dict(stages=[(32, 2, 4)]), r'stage 0 must be .* got \(32, 2, 4\)'),
        (dict(stages=[(32, 2, (2, 0))]), r'stage 0 has \(2, 0\)'),
        (dict(stages=[(32, 3, (2,))]), 'stage 0: embed_dims=32 is no multiple of num_heads=3'),
        (dict(finest_map=True, out_indices=(1, 2)), r'got \(1, 2\) and 8'),
        (dict(finest_map=True, patch_size=7), 'even patch_size.* and 7'),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make(**kwargs)
