from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from mmtoken.layers.common.regions import all_cells, make_region_layout, plan_regions, pool_regions
from mmtoken.layers.dge import deformable
from mmtoken.layers.dge.block import DynamicGranularityBlock
from mmtoken.layers.dge.deformable import OFFSET_GRADIENT, DeformableAttention, _gather_samples

DATA = Path(__file__).parents[2] / 'data'


def test_released_block():
    golden = dict(np.load(DATA / 'dge_block_dpvt.npz'))
    state = {
        name[3:].replace('attn.v.', 'attn.value.').replace('attn_weight', 'weights'): value
        for name, value in golden.items()
        if name.startswith('sd.')
    }
    hidden, dims = state['mlp.fc1.weight'].shape
    attn = DeformableAttention(dims, int(golden['num_heads']), int(golden['num_points']))
    block = DynamicGranularityBlock(dims, attn, hidden, granularities=(1,)).eval()
    block.load_state_dict({name: torch.from_numpy(value) for name, value in state.items()})
    x, grid = torch.from_numpy(golden['x']), (int(golden['H']), int(golden['W']))
    for context in (torch.no_grad, torch.enable_grad):
        with context():
            out = block(x, block.layout(grid, 0, x.device))
        torch.testing.assert_close(out, torch.from_numpy(golden['y']), atol=2e-5, rtol=0)


def sample(value, x, y):
    """Bilinear, of a map ``(C, H, W)``, zero outside."""
    left, top = int(np.floor(x)), int(np.floor(y))
    out = torch.zeros(len(value), dtype=value.dtype)
    for row, v in ((top, 1 - (y - top)), (top + 1, y - top)):
        for column, u in ((left, 1 - (x - left)), (left + 1, x - left)):
            if 0 <= row < value.shape[1] and 0 <= column < value.shape[2]:
                out = out + u * v * value[:, row, column]
    return out


def make(num_points=3):
    attn = DeformableAttention(8, 2, num_points).double()
    nn.init.normal_(attn.offsets.weight)
    nn.init.normal_(attn.weights.weight)
    return attn


@pytest.mark.parametrize('granularities', [(1,), (1, 2, 4)])
def test_queries_sample_around_the_middle_of_their_cell(granularities):
    attn, grid = make(), (5, 7)
    x = torch.randn(2, 35, 8, dtype=torch.float64)
    regions = make_region_layout(grid, granularities, 4)
    plan = plan_regions(torch.randint(len(granularities), (2, *regions.shape)), regions)
    queries = pool_regions(x, plan)
    with torch.no_grad():
        out = attn(queries, attn.keys(x, plan.queries.layout), plan.queries)
        values = attn.value(x).mT.unflatten(2, grid)
        offsets = attn.offsets(queries).view(-1, 2, 3, 2)
        weights = attn.weights(queries).view(-1, 2, 3).softmax(-1)
    expected = []
    for q, image in enumerate(plan.queries.image.tolist()):
        x0, y0 = plan.queries.center[q].tolist()
        heads = [
            sum(
                weights[q, h, p] * sample(
                    values[image, 4 * h : 4 * h + 4],
                    x0 + offsets[q, h, p, 0].item(),
                    y0 + offsets[q, h, p, 1].item(),
                )
                for p in range(3)
            )
            for h in range(2)
        ]  # fmt: skip
        expected.append(torch.cat(heads))
    expected = attn.proj(torch.stack(expected)).detach()
    torch.testing.assert_close(out, expected, atol=1e-9, rtol=1e-9)


def test_without_offsets_tokens_find_themselves():
    attn, grid = make(1), (4, 6)
    nn.init.zeros_(attn.offsets.weight)
    nn.init.zeros_(attn.offsets.bias)
    x = torch.randn(1, 24, 8, dtype=torch.float64)
    cells = all_cells(make_region_layout(grid, (1,), 4), 1)
    out = attn(x[0], attn.keys(x, cells.layout), cells)
    torch.testing.assert_close(out, attn.proj(attn.value(x[0])))


def test_gradients(monkeypatch):
    attn, grid = make(), (3, 4)
    x = torch.randn(1, 12, 8, dtype=torch.float64, requires_grad=True)
    cells = all_cells(make_region_layout(grid, (1,), 4), 1)

    def attend(bias, x):
        return functional_call(
            attn, {'offsets.bias': bias}, (x[0], attn.keys(x, cells.layout), cells)
        )

    bias = attn.offsets.bias.detach().clone().requires_grad_()
    (slow,) = torch.autograd.grad(attend(bias, x).square().sum(), bias)
    monkeypatch.setattr(deformable, 'OFFSET_GRADIENT', 1.0)
    (full,) = torch.autograd.grad(attend(bias, x).square().sum(), bias)
    assert torch.autograd.gradcheck(attend, (bias, x))
    torch.testing.assert_close(slow, OFFSET_GRADIENT * full)


@pytest.mark.parametrize('grid', [(5, 7), (1, 1)])
def test_deterministic_sampling_is_grid_sample(grid):
    value = torch.randn(3, 4, *grid, dtype=torch.float64, requires_grad=True)
    places = torch.empty(3, 11, 2, 2, dtype=torch.float64).uniform_(-1.6, 1.6).requires_grad_()
    results = []
    for sample in (F.grid_sample, _gather_samples):
        out = sample(value, places, align_corners=False)
        results.append([out, *torch.autograd.grad(out.sin().sum(), (value, places))])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9)
