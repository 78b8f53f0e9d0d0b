import pytest
import torch
from helpers import randomize
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from mmtoken.fast import optimize_for_cpu, tiling
from mmtoken.layers.common.stem import ConvStem


def fuse(stem):
    for i in (0, 2):
        layer = stem.proj[i]
        layer.c, layer.bn = fuse_conv_bn_eval(layer.c, layer.bn), nn.Identity()


def forget_statistics(stem):
    for i in (0, 2):
        stem.proj[i].bn.running_mean = stem.proj[i].bn.running_var = None


def dilate(stem):
    conv = stem.proj[2].c
    conv.dilation, conv.padding = (2, 2), (2, 2)


@torch.no_grad()
@pytest.mark.parametrize('change', [lambda stem: None, fuse, forget_statistics, dilate])
@pytest.mark.parametrize('rows', [1, 3, 100])
def test_strips_are_of_the_layers_that_are_there(change, rows, monkeypatch):
    stem, x = randomize(ConvStem(8)).eval(), torch.randn(2, 3, 37, 50)
    for i in (0, 2):
        stem.proj[i].bn.running_mean.normal_()
        stem.proj[i].bn.running_var.uniform_(0.5, 2)
    change(stem)
    expected = stem(x)
    monkeypatch.setattr(tiling, 'TILE_ELEMENTS', 8 * rows * 2 * 13)
    torch.testing.assert_close(optimize_for_cpu(stem)(x), expected, atol=1e-4, rtol=1e-4)
