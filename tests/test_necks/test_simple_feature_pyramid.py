import pytest
import torch

from mmtoken.backbones import STViTDeiT
from mmtoken.necks import SimpleFeaturePyramid


@pytest.mark.parametrize('norm', ['LN', 'BN', None])
@pytest.mark.parametrize('num_outs', [2, 4, 5, 6])
@pytest.mark.parametrize('grid', [(6, 8), (5, 7), (1, 1)])
def test_shapes(norm, num_outs, grid):
    neck = SimpleFeaturePyramid(8, 12, num_outs, norm=norm).eval()
    outs = neck((torch.randn(2, 8, *grid),))
    assert isinstance(outs, tuple) and len(outs) == num_outs
    scales = (4, 2, 1, 1 / 2, 1 / 4, 1 / 8)
    for out, scale in zip(outs, scales, strict=False):
        rows, columns = (-int(-side * scale // 1) for side in grid)
        assert out.shape == (2, 12, rows, columns)
        assert out.is_contiguous()


@pytest.mark.parametrize('multi_level', [False, True])
@pytest.mark.parametrize(
    'scales, sides',
    [
        ((2, 1, 0.5), [(10, 14), (5, 7), (3, 4), (2, 2), (1, 1)]),
        ([4, 1], [(20, 28), (5, 7), (3, 4), (2, 2), (1, 1)]),
        ((0.5,), [(3, 4), (2, 2), (1, 1)]),
    ],
)
def test_scales(scales, sides, multi_level):
    neck = SimpleFeaturePyramid(8, 12, len(sides), multi_level, scales=scales).eval()
    outs = neck(torch.randn(len(scales), 2, 8, 5, 7).unbind())
    assert [tuple(out.shape) for out in outs] == [(2, 12, *side) for side in sides]
    assert len(neck.levels) == len(scales)


def test_fewer_outs_than_scales():
    neck = SimpleFeaturePyramid(8, 12, num_outs=1, scales=(2, 1, 0.5))
    (out,) = neck((torch.randn(1, 8, 5, 7),))
    assert out.shape == (1, 12, 10, 14) and len(neck.levels) == 1


def test_all_levels_are_of_the_last_map():
    neck, maps = SimpleFeaturePyramid(8).eval(), torch.randn(3, 1, 8, 4, 4)
    for ours, other in zip(neck(tuple(maps)), neck((maps[2],)), strict=True):
        torch.testing.assert_close(ours, other)


def test_multi_level_takes_each_level_from_its_map():
    neck = SimpleFeaturePyramid(8, num_outs=4, multi_level=True)
    maps = [torch.randn(1, 8, 4, 4, requires_grad=True) for _ in range(4)]
    for i, out in enumerate(neck(maps)):
        grads = torch.autograd.grad(out.square().sum(), maps, allow_unused=True)
        assert [grad is not None for grad in grads] == [j == i for j in range(4)]


@pytest.mark.parametrize('norm', ['LN', 'BN', None])
def test_gradients_reach_every_parameter(norm):
    neck = SimpleFeaturePyramid(8, 12, norm=norm)
    neck.init_weights()
    sum((out * torch.randn_like(out)).sum() for out in neck((torch.randn(2, 8, 6, 6),))).backward()
    for name, parameter in neck.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize(
    'bad, message',
    [
        (dict(in_channels=6), 'multiple of 4, got 6'),
        (dict(num_outs=0), 'at least 1, got 0'),
        (dict(num_outs=3, multi_level=True), 'at least 4 with multi_level, got 3'),
        (
            dict(num_outs=2, multi_level=True, scales=(2, 1, 0.5)),
            'at least 3 with multi_level, got 2',
        ),
        (dict(norm='GN'), "got 'GN'"),
        (dict(scales=()), r'scales must be some of \(4.0, 2.0, 1.0, 0.5\), falling, got \(\)'),
        (dict(scales=(1, 2)), r'falling, got \(1, 2\)'),
        (dict(scales=[2, 2, 1]), r'got \(2, 2, 1\)'),
        (dict(scales=(8, 4)), r'got \(8, 4\)'),
    ],
)
def test_bad_arguments(bad, message):
    with pytest.raises(ValueError, match=message):
        SimpleFeaturePyramid(**{'in_channels': 8, **bad})


def test_bad_inputs():
    with pytest.raises(ValueError, match='takes 4 maps, got 1'):
        SimpleFeaturePyramid(8, multi_level=True)([torch.randn(1, 8, 4, 4)])
    with pytest.raises(ValueError, match='takes 3 maps, got 4'):
        SimpleFeaturePyramid(8, multi_level=True, scales=(2, 1, 0.5))(torch.randn(4, 1, 8, 4, 4))
    arch = dict(embed_dims=8, num_layers=4, num_heads=2, feedforward_channels=8)
    tokens = STViTDeiT(arch, base_layers=1, out_type='tokens')(torch.randn(1, 3, 32, 32))
    with pytest.raises(TypeError, match='takes maps, got SparseFeatures'):
        SimpleFeaturePyramid(8)(tokens)
