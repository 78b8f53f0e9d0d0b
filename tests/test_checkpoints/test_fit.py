"""Tensors take the shapes of a model."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmtoken.checkpoints import fit_to
from mmtoken.checkpoints.fit import adopt_grids, enlarge, has_grids
from mmtoken.layers.common.vit import CrossAttention


def test_enlarged_projection_sees_means_of_pixels():
    kernel, image = torch.randn(5, 3, 4, 4), torch.randn(2, 3, 24, 16)
    means = F.avg_pool2d(image, 2)
    torch.testing.assert_close(
        F.conv2d(image, enlarge(kernel, 2), stride=8), F.conv2d(means, kernel, stride=4)
    )


class WithPositions(nn.Module):
    def __init__(self, prefix, grid):
        super().__init__()
        self.pos_grid = grid
        self.pos_embed = nn.Parameter(torch.randn(1, prefix + grid[0] * grid[1], 8))


@pytest.mark.parametrize('prefix', [0, 1])
def test_grids_are_adopted_in_place(prefix):
    model = nn.Sequential(WithPositions(prefix, (3, 4)))
    positions = model[0].pos_embed
    assert has_grids(model) and not has_grids(nn.Linear(1, 1))
    adopt_grids(model, {'0.pos_embed': (5, 2)})
    assert model[0].pos_embed is positions  # an optimizer keeps it
    assert positions.shape == (1, prefix + 10, 8) and model[0].pos_grid == (5, 2)


def test_joint_projections_are_split():
    """ViT's ``qkv`` in a layer that has ``q`` and ``kv``."""
    joint = {'qkv.weight': torch.randn(24, 8), 'qkv.bias': torch.randn(24)}
    output = {f'proj.{name}': tensor for name, tensor in nn.Linear(8, 8).state_dict().items()}
    model = nn.ModuleDict(dict(attn=CrossAttention(8, num_heads=2)))
    state = {f'attn.{name}': tensor for name, tensor in {**joint, **output}.items()}
    fitted, report = fit_to(model, state, 'file.pth')
    for kind in ('weight', 'bias'):
        query, key_value = fitted[f'attn.q.{kind}'], fitted[f'attn.kv.{kind}']
        assert torch.equal(torch.cat([query, key_value]), joint[f'qkv.{kind}'])
    assert sorted(report.split) == ['attn.qkv.bias', 'attn.qkv.weight']


@pytest.mark.parametrize('channels', [1, 6])
def test_other_channels_see_a_grey_image_alike(channels):
    model = nn.ModuleDict(dict(patch_embed=nn.Conv2d(channels, 5, 4)))
    given = nn.ModuleDict(dict(patch_embed=nn.Conv2d(3, 5, 4)))
    model.stem_names = ('patch_embed',)
    fitted, report = fit_to(model, given.state_dict(), 'file.pth')
    model.load_state_dict(fitted)
    assert report.channels == (3, channels)
    grey = torch.randn(1, 1, 8, 8)
    expected = given.patch_embed(grey.expand(1, 3, 8, 8))
    out = model.patch_embed(grey.expand(1, channels, 8, 8))
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)
