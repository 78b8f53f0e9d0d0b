import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mmtoken import fast
from mmtoken.fast import dge, tiling
from mmtoken.layers.common.regions import all_cells, make_region_layout
from mmtoken.layers.dge.block import DynamicGranularityBlock
from mmtoken.layers.dge.deformable import DeformableAttention
from mmtoken.layers.dge.spatial_reduction import SpatialReductionAttention
from mmtoken.layers.dge.stage import run_blocks
from mmtoken.runtime.reference import reference_path
from mmtoken.runtime.routing_override import routing_override

ATTENTION = dict(
    plain=lambda: SpatialReductionAttention(16, 2, 1),
    reduced=lambda: SpatialReductionAttention(16, 2, 2),
    deformable=lambda: DeformableAttention(16, 2, 3),
)
GRID = (9, 14)


@pytest.fixture(autouse=True)
def tiny_tiles(monkeypatch):
    monkeypatch.setattr(tiling, 'TILE_ELEMENTS', 16 * 7)


def make(attn='reduced', granularities=(1, 2, 4)):
    block = DynamicGranularityBlock(16, ATTENTION[attn](), 24, granularities).eval()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    return block


def run(block, x, prefix=0):
    layout = block.layout(GRID, prefix, x.device)
    with routing_override(query_ratio=0.5):
        return run_blocks([block], x, layout, None)[0]


@pytest.fixture
def calls(monkeypatch):
    """How many tiles there were."""
    calls, update = [], DynamicGranularityBlock.block_update

    def count(self, queries, *args, **kwargs):
        calls.append(len(queries))
        return update(self, queries, *args, **kwargs)

    monkeypatch.setattr(DynamicGranularityBlock, 'block_update', count)
    return calls


@pytest.mark.parametrize('attn, prefix', [*((kind, 0) for kind in ATTENTION), ('plain', 2)])
@pytest.mark.parametrize('granularities', [(1, 2, 4), (1,)])
@pytest.mark.parametrize('strided', [False, True])
def test_tiled_block_is_the_block(attn, prefix, granularities, strided, calls):
    block, x = make(attn, granularities), torch.randn(2, prefix + 9 * 14, 16)
    if strided:
        x = x.mT.contiguous().mT
    with torch.no_grad():
        expected = run(block, x, prefix)
        assert len(calls) == 1
        out = run(fast.optimize_for_cpu(block), x, prefix)
    assert len(calls) > 8
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_only_in_inference_of_plain_layers(calls):
    block, x = fast.optimize_for_cpu(make()), torch.randn(2, 9 * 14, 16)
    run(block, x)  # with gradients
    with torch.no_grad():
        run(block.train(), x)
        block.eval()
        with reference_path():
            run(block, x)
        hook = block.mlp.fc1.register_forward_hook(lambda module, args, out: None)
        run(block, x)
        assert len(calls) == 4
        hook.remove()
        run(block, x)
        assert len(calls) > 8
        calls.clear()
        run(fast.optimize_for_cpu(block, enabled=False), x)
    assert len(calls) == 1 and type(block) is DynamicGranularityBlock


@settings(max_examples=40, deadline=None)
@given(grid=st.tuples(st.integers(1, 9), st.integers(1, 9)), length=st.integers(1, 60))
def test_tiles_are_parts_of_single_images(grid, length):
    cells = all_cells(make_region_layout(grid, (1, 2, 4), 4, 1), 3)
    parts = list(dge.cell_tiles(cells, length))
    assert torch.equal(torch.cat([tile.cells for _, _, tile in parts]), cells.cells)
    for image, part, tile in parts:
        assert torch.equal(tile.cells, cells.cells[part])
        assert (tile.image == image).all()
        assert tile.lengths == [len(tile.cells)] and 0 < len(tile.cells) <= length
