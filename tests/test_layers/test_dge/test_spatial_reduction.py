import pytest
import torch
from torch import nn

from mmtoken.layers.common.regions import all_cells, make_region_layout
from mmtoken.layers.dge.spatial_reduction import SpatialReductionAttention


def dense(attn, x, norm, grid):
    """Every token a query."""
    cells = all_cells(make_region_layout(grid, (1,), 1, x.shape[1] - grid[0] * grid[1]), len(x))
    return attn(norm(x).flatten(0, 1), attn.keys(norm(x), cells.layout), cells).view_as(x)


@pytest.mark.parametrize('sr_ratio', [1, 2, 3])
@pytest.mark.parametrize('grid', [(6, 12), (7, 5), (1, 2)])
def test_is_torchs_attention(sr_ratio, grid):
    attn, norm = SpatialReductionAttention(16, 4, sr_ratio), nn.LayerNorm(16)
    theirs = nn.MultiheadAttention(16, 4, batch_first=True)
    theirs.load_state_dict(
        dict(
            in_proj_weight=torch.cat([attn.q.weight, attn.kv.weight]),
            in_proj_bias=torch.cat([attn.q.bias, attn.kv.bias]),
            **{f'out_proj.{name}': p for name, p in attn.proj.named_parameters()},
        )
    )
    x = torch.randn(2, grid[0] * grid[1], 16)
    keys = norm(x)
    if sr_ratio > 1:
        rows, columns = (-(-n // sr_ratio) for n in grid)
        padded = torch.zeros(2, 16, rows * sr_ratio, columns * sr_ratio)
        padded[..., : grid[0], : grid[1]] = keys.mT.unflatten(2, grid)
        patches = padded.unfold(2, sr_ratio, sr_ratio).unfold(3, sr_ratio, sr_ratio)
        keys = torch.einsum('bcijuv,dcuv->bijd', patches, attn.sr.weight) + attn.sr.bias
        keys = attn.norm(keys.flatten(1, 2))
    expected, _ = theirs(norm(x), keys, keys)
    torch.testing.assert_close(dense(attn, x, norm, grid), expected, atol=1e-5, rtol=1e-5)


def test_biases():
    attn = SpatialReductionAttention(16, 2, qkv_bias=False)
    assert attn.q.bias is attn.kv.bias is None and attn.proj.bias is not None


def test_norm_of_keys_is_torchs_own():
    assert SpatialReductionAttention(16, 2, 2).norm.eps == 1e-5
    assert not hasattr(SpatialReductionAttention(16, 2, 1), 'norm')
