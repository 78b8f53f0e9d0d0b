import pytest
import torch

from mmtoken.layers.dge.block import DynamicGranularityBlock
from mmtoken.layers.dge.spatial_reduction import SpatialReductionAttention
from mmtoken.layers.dge.stage import run_blocks
from mmtoken.runtime.decisions import (
    RoutingDecision,
    TokenGroups,
    record_decision,
    record_groups,
    record_rectangles,
    record_routing,
    record_tokens,
)
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


def test_groups_are_made_for_records_of_tokens_only():
    made = []

    def make():
        made.append(TokenGroups('pooled', torch.zeros(1, 2, 2)))
        return made[-1]

    record_groups(make)
    with record_routing() as routing:
        record_groups(make)
    assert not made and not routing
    with record_tokens() as outer, record_routing() as routing, record_tokens() as inner:
        record_groups(make)
        record_decision(decision(1))
    assert len(made) == 1 and len(routing) == 1
    assert [type(each) for each in outer] == [TokenGroups, RoutingDecision] and inner == outer


def test_rectangles():
    with record_tokens() as records:
        record_rectangles('pooled', 2, (3, 4), lambda place, side: place // 2, cells=2)
    (groups,) = records
    assert groups.owner.tolist() == [[[0, 0, 1, 1], [0, 0, 1, 1], [4, 4, 5, 5]]] * 2
    assert groups.name == 'pooled' and groups.cells == 2


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
