import pytest
import torch

from mmtoken.layers.dge.block import DynamicGranularityBlock
from mmtoken.layers.dge.spatial_reduction import SpatialReductionAttention
from mmtoken.layers.dge.stage import run_blocks
from mmtoken.runtime.decisions import RoutingDecision, record_decision, record_routing
from mmtoken.runtime.routing_override import routing_override


def decision(i):
    return RoutingDecision(torch.full((1, 1, 1), i), (1, 2), 2, (2, 2), None)


def test_records_fill_in_order_and_only_while_open():
    record_decision(decision(0))
    with record_routing() as outer:
        record_decision(decision(1))
        with record_routing() as inner:
            record_decision(decision(2))
        record_decision(decision(3))
    record_decision(decision(4))
    assert [d.choice.item() for d in outer] == [1, 2, 3]
    assert [d.choice.item() for d in inner] == [2]


def test_equal_records_are_told_apart():
    with record_routing() as outer:
        with record_routing() as inner:
            pass
        record_decision(decision(1))
    assert len(outer) == 1 and not inner


def test_records_close_when_something_fails():
    with pytest.raises(KeyError), record_routing() as record:
        raise KeyError
    record_decision(decision(0))
    assert not record


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('with_cp', [True, False])
def test_blocks_note_what_they_chose(training, with_cp):
    block = DynamicGranularityBlock(8, SpatialReductionAttention(8, 2), 16).train(training)
    layout = block.layout((6, 9), 0, 'cpu')
    x = torch.randn(2, 6 * 9, 8, requires_grad=True)
    padding = torch.zeros(2, 2, 3, dtype=torch.bool)
    padding[1, :, 2] = True
    with record_routing() as record, routing_override(query_ratio=0.4):
        out, _ = run_blocks([block], x, layout, padding, with_cp)
        out.sum().backward()
        run_blocks([block], x, layout, None, with_cp)
    noted, unpadded = record
    assert noted.granularities == (1, 2, 4) and noted.region_size == 4 and noted.grid == (6, 9)
    assert noted.padding is padding and unpadded.padding is None
    assert noted.choice.shape == (2, 2, 3)
    assert (noted.choice[padding] == 2).all() and (noted.choice[~padding] != 2).any()


def test_plain_blocks_note_nothing():
    block = DynamicGranularityBlock(8, SpatialReductionAttention(8, 2), 16, granularities=(1,))
    with record_routing() as record:
        run_blocks([block], torch.randn(1, 16, 8), block.layout((4, 4), 0, 'cpu'), None)
    assert not record
