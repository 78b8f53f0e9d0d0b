"""Swin's parts against other implementations, with copied weights."""

import pytest
import torch
from mmdet.models.backbones.swin import SwinBlock as MMDetSwinBlock
from timm.models import swin_transformer as timm_swin

from mmtoken.layers.common.swin import PatchMerging, SwinBlock

MMDET_NAMES = {'attn.w_msa.': 'attn.', 'ffn.layers.0.0.': 'mlp.fc1.', 'ffn.layers.1.': 'mlp.fc2.'}


def assert_equal_blocks(theirs, grid, shift, call, rename=None):
    ours = SwinBlock(24, num_heads=3, shift=shift)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    weights = {}
    for name, parameter in theirs.named_parameters():
        for start, new_start in (rename or {}).items():
            name = name.replace(start, new_start)
        weights[name] = parameter
    ours.load_state_dict(weights)
    x = torch.randn(2, *grid, 24)
    torch.testing.assert_close(ours(x), call(x), atol=1e-4, rtol=1e-4)


# timm shifts before it pads, Swin's authors and mmdet after: on padded grids the two differ.
@pytest.mark.parametrize('grid, shift', [((14, 21), 0), ((14, 21), 3), ((10, 17), 0)])
def test_block_equals_timm(grid, shift):
    theirs = timm_swin.SwinTransformerBlock(24, grid, num_heads=3, window_size=7, shift_size=shift)
    assert_equal_blocks(theirs, grid, shift, theirs)


@pytest.mark.parametrize('grid', [(14, 21), (10, 17), (3, 5)])
@pytest.mark.parametrize('shift', [0, 3])
def test_block_equals_mmdet(grid, shift):
    theirs = MMDetSwinBlock(24, 3, feedforward_channels=96, window_size=7, shift=shift > 0).eval()
    assert_equal_blocks(
        theirs, grid, shift, lambda x: theirs(x.flatten(1, 2), grid).view_as(x), MMDET_NAMES
    )


@pytest.mark.parametrize('grid', [(6, 8), (5, 7)])
def test_patch_merging_equals_timm(grid):
    theirs = timm_swin.PatchMerging(12)
    ours = PatchMerging(12)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, *grid, 12)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)
