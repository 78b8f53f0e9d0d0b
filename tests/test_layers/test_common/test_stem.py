"""Patch embeddings on any image size."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmtoken.layers.common.stem import ConvStem, PatchEmbed, pad_to_stride

SIZES = [(28, 28), (30, 17), (3, 50), (1, 1)]


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('side', [1, 4, 7])
@pytest.mark.parametrize('norm', [True, False])
def test_patches_are_projected(size, side, norm):
    stem, x = PatchEmbed(8, stride=side, norm=norm).double(), torch.randn(2, 3, *size).double()
    rows, columns = (-(-n // side) for n in size)
    padded = F.pad(x, (0, columns * side - size[1], 0, rows * side - size[0]))
    assert torch.equal(pad_to_stride(x, side), padded)
    patches = F.unfold(padded, side, stride=side).transpose(1, 2)  # (B, patches, 3 * side**2)
    expected = F.linear(patches, stem.proj.weight.flatten(1), stem.proj.bias)
    expected = stem.norm(expected).unflatten(1, (rows, columns))
    torch.testing.assert_close(stem(x), expected, atol=1e-12, rtol=0)


def test_images_may_be_strided():
    stem, x = PatchEmbed(8), torch.randn(2, 12, 20, 3).permute(0, 3, 1, 2)
    torch.testing.assert_close(stem(x), stem(x.contiguous()))


@pytest.mark.parametrize('size', SIZES)
def test_convolutional_stem(size):
    """Two convolutions of stride 2, each with a batch norm in front of Hardswish."""
    stem, x = ConvStem(8).train(), torch.randn(2, 3, *size)
    y = pad_to_stride(x, 4)
    for conv, norm in ((stem.proj[0].c, stem.proj[0].bn), (stem.proj[2].c, stem.proj[2].bn)):
        assert isinstance(norm, nn.BatchNorm2d) and conv.bias is None
        y = F.batch_norm(F.conv2d(y, conv.weight, stride=2, padding=1), None, None, training=True)
        y = F.hardswish(y)
    assert y.shape[2:] == (-(-size[0] // 4), -(-size[1] // 4))
    torch.testing.assert_close(stem(x), y.permute(0, 2, 3, 1), atol=1e-5, rtol=1e-5)
