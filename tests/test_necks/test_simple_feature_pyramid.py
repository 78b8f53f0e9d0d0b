from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mmtoken.backbones import STViTDeiT
from mmtoken.necks import SimpleFeaturePyramid
from mmtoken.necks.simple_feature_pyramid import UnfoldPlanes

GOLDEN = Path(__file__).parents[1] / 'data' / 'swat_ops_golden.npz'


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


@pytest.mark.parametrize('scale', [2, 4])
def test_planes_are_unfolded_as_in_the_release(scale):
    golden = np.load(GOLDEN)
    unfold = UnfoldPlanes(side=4, scale=scale)
    out = unfold(torch.from_numpy(golden['partial.in']))
    assert torch.equal(out, torch.from_numpy(golden[f'partial.out_x{scale}']))


@pytest.mark.parametrize('norm', ['LN', 'BN', None])
@pytest.mark.parametrize('multi_level', [False, True])
def test_structured_levels(norm, multi_level):
    """Levels of scale 2 and 4 have convolutions of what is left of the channels; others stay."""
    neck = SimpleFeaturePyramid(64, 12, 4, multi_level, norm, plane_size=8).eval()
    plain = SimpleFeaturePyramid(64, 12, 4, multi_level, norm)
    maps = [torch.randn(1, 64, 5, 7, requires_grad=True) for _ in range(4)]
    outs = neck(maps)
    for i, side in enumerate([(20, 28), (10, 14), (5, 7), (3, 4)]):
        assert outs[i].shape == (1, 12, *side) and outs[i].is_contiguous()
    assert not any(isinstance(m, nn.ConvTranspose2d) for m in neck.modules())
    channels = [
        next(m for m in level if isinstance(m, nn.Conv2d)).in_channels for level in neck.levels
    ]
    assert channels == [4, 16, 64, 64]
    for level, other in zip(neck.levels[2:], plain.levels[2:], strict=True):
        assert str(level) == str(other)
    for i, out in enumerate(outs):
        seen = maps[i if multi_level else 3]
        assert torch.autograd.grad(out.square().sum(), seen)[0].abs().sum() > 0


def test_a_cell_of_a_plane_is_a_place_of_the_finer_map():
    neck = SimpleFeaturePyramid(64, 12, 1, norm=None, plane_size=8).eval()
    map_ = torch.zeros(1, 64, 3, 3)
    changed = map_.clone()
    changed[0, 1 * 8 + 6, 1, 1] = 1  # row 1 and column 6 of 8 in the middle token
    difference = (neck([changed])[0] - neck([map_])[0]).abs().sum(dim=1)[0]
    # Rows 0 and 1 of a plane are row 0 of the token's four, columns 6 and 7 column 3; a 3 x 3
    # convolution follows.
    rows, columns = difference.nonzero().unbind(1)
    assert rows.unique().tolist() == [3, 4, 5] and columns.unique().tolist() == [6, 7, 8]


@pytest.mark.parametrize(
    'bad, message',
    [
        (dict(plane_size=0), 'positive.*plane_size=0, in_channels=8'),
        (dict(plane_size=4), 'multiple of its square.*plane_size=4, in_channels=8'),
        (dict(plane_size=2), 'multiple of scale 4, got 2'),
        (dict(plane_size=3, in_channels=36, scales=(2, 1)), 'multiple of scale 2, got 3'),
        (dict(in_channels=6), 'multiple of 4, got 6'),
        (dict(num_outs=0), 'of 1 or more, got 0'),
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


def test_any_planes_do_where_none_are_unfolded():
    neck = SimpleFeaturePyramid(36, 12, 2, scales=(1, 0.5), plane_size=3)
    plain = SimpleFeaturePyramid(36, 12, 2, scales=(1, 0.5))
    assert str(neck) == str(plain)


def test_bad_inputs():
    with pytest.raises(ValueError, match='takes 4 maps, got 1'):
        SimpleFeaturePyramid(8, multi_level=True)([torch.randn(1, 8, 4, 4)])
    with pytest.raises(ValueError, match='takes 3 maps, got 4'):
        SimpleFeaturePyramid(8, multi_level=True, scales=(2, 1, 0.5))(torch.randn(4, 1, 8, 4, 4))
    arch = dict(embed_dims=8, num_layers=4, num_heads=2, feedforward_channels=8)
    tokens = STViTDeiT(arch, base_layers=1, out_type='tokens')(torch.randn(1, 3, 32, 32))
    with pytest.raises(TypeError, match='takes maps, got SparseFeatures'):
        SimpleFeaturePyramid(8)(tokens)
