from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtoken.layers.swat.planes import fold_planes, unfold_planes

GOLDEN = np.load(Path(__file__).parents[2] / 'data' / 'swat_ops_golden.npz')


def golden_map(name):
    """``(B, C, H, W)`` of the release to our ``(B, H, W, C)``."""
    return torch.from_numpy(GOLDEN[name]).permute(0, 2, 3, 1)


def test_folding_equals_the_release():
    pixels, tokens = golden_map('fold.in'), golden_map('fold.out')
    assert torch.equal(fold_planes(pixels, side=1, scale=2), tokens)
    assert torch.equal(unfold_planes(tokens, side=2, scale=2), pixels)


@pytest.mark.parametrize('scale', [2, 4])
def test_partial_unfolding_equals_the_release(scale):
    tokens, parts = golden_map('partial.in'), golden_map(f'partial.out_x{scale}')
    assert torch.equal(unfold_planes(tokens, side=4, scale=scale), parts)
    assert torch.equal(fold_planes(parts, side=4 // scale, scale=scale), tokens)


@settings(max_examples=50, deadline=None)
@given(
    batch=st.integers(1, 2),
    height=st.integers(1, 4),
    width=st.integers(1, 4),
    planes=st.integers(1, 3),
    part=st.integers(1, 4),
    scale=st.integers(1, 4),
)
def test_folding_and_unfolding_are_inverse(batch, height, width, planes, part, scale):
    side = part * scale
    x = torch.randn(batch, height, width, planes * side**2)
    parts = unfold_planes(x, side, scale)
    assert parts.shape == (batch, height * scale, width * scale, planes * part**2)
    assert torch.equal(fold_planes(parts, part, scale), x)
    pixels = unfold_planes(x, side, side)
    assert torch.equal(unfold_planes(parts, part, part), pixels)
    expected = F.pixel_unshuffle(pixels.permute(0, 3, 1, 2), side).permute(0, 2, 3, 1)
    assert torch.equal(fold_planes(pixels, 1, side), expected)
