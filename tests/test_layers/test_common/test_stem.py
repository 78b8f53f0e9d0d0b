"""Patches cut and projected, against convolutions."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmtoken.layers.common.stem import PatchStem, pad_to_stride, patchify, project


@pytest.mark.parametrize('side', [1, 4, 7])
@pytest.mark.parametrize('size', [(28, 28), (30, 17), (3, 50), (1, 1)])
@pytest.mark.parametrize('channels', [3, 5])
def test_projected_patches_are_a_convolution(side, size, channels):
    conv = nn.Conv2d(channels, 8, side, side).double()
    x = torch.randn(2, channels, *size, dtype=torch.float64)
    height, width = (-(-n // side) for n in size)
    patches = patchify(x, side)
    assert patches.shape == (2, height, width, channels * side**2)
    padded = F.pad(x, (0, width * side - size[1], 0, height * side - size[0]))
    assert torch.equal(pad_to_stride(x, side), padded)
    expected = conv(padded).permute(0, 2, 3, 1)
    torch.testing.assert_close(project(patches, conv), expected, atol=1e-12, rtol=0)


def test_some_patches_are_projected_alone():
    conv, x = nn.Conv2d(3, 8, 4, 4, bias=False), torch.randn(2, 3, 12, 20)
    patches = patchify(x, 4)
    some = torch.tensor([3, 0, 14, 29])
    expected = conv(x).permute(0, 2, 3, 1).flatten(0, 2)[some]
    torch.testing.assert_close(project(patches.flatten(0, 2)[some], conv), expected)


def test_patches_of_strided_images():
    x = torch.randn(2, 12, 20, 3).permute(0, 3, 1, 2)
    assert torch.equal(patchify(x, 4), patchify(x.contiguous(), 4))
    stem = PatchStem(8)
    torch.testing.assert_close(stem(x), stem(x.contiguous()))
