import pytest
import torch

from mmtoken.analysis.decisions import (
    coarse_ratio,
    count_queries,
    image_coarse_ratios,
    image_ratios,
    mean_density,
    query_ratio,
    ratio_unit,
    real_regions,
    split_stages,
    stride_of,
    token_owners,
)
from mmtoken.runtime.decisions import RoutingDecision

GRID = (8, 10)  # whole regions of 4 x 4 in two columns, and a third column of two tokens


def decide(*choices, grid=GRID, padding=None):
    return RoutingDecision(torch.tensor(choices), (1, 2, 4), 4, grid, padding)


def test_owners_are_as_many_as_queries():
    decision = decide([[0, 1, 2], [2, 1, 1]])
    owner = token_owners(decision)[0]
    assert owner[4:, :4].unique().tolist() == [40] and owner[5, 7] == 46
    assert len(owner.unique()) == count_queries(decision)[0].sum()


def test_queries_are_the_cells_that_exist():
    queries, tokens = count_queries(decide([[0, 1, 2], [2, 1, 1]]))
    assert tokens.tolist() == [[16, 16, 8]] * 2
    assert queries.tolist() == [[[16, 4, 1], [1, 4, 2]]]


def test_ratios_leave_padding_out():
    padding = torch.tensor([[[False, False, True]] * 2, [[False] * 3] * 2])
    decision = decide([[0, 0, 2], [2, 2, 2]], [[0] * 3] * 2, padding=padding)
    assert real_regions(decision).sum() == 4 + 6
    assert image_ratios([decision]).tolist() == [34 / 64, 1]
    assert query_ratio([decision, decision]) == (34 / 64 + 1) / 2


def test_ratios_are_of_tokens_not_of_blocks():
    fine, coarse = decide([[0] * 3] * 2), decide([[2]], grid=(4, 4))
    assert query_ratio([fine, coarse]) == pytest.approx((80 + 1) / (80 + 16))


def test_coarse_ratios_are_of_regions_without_padding():
    padding = torch.tensor([[[False, False, True]] * 2, [[False] * 3] * 2])
    decision = decide([[0, 1, 2], [2, 2, 2]], [[0] * 3] * 2, padding=padding)
    assert image_coarse_ratios([decision]).tolist() == [2 / 4, 0]
    assert coarse_ratio([decision, decision]) == 1 / 4


def test_units_are_said():
    decision = decide([[0] * 3] * 2)
    assert ratio_unit([decision]) == ratio_unit([decision] * 2) == 'queries per token'
    assert ratio_unit([decision._replace(per_network=True)]) == 'tokens per fine patch'


def test_density_is_the_mean_of_what_blocks_chose():
    blocks = [decide([[0, 1, 2]] * 2), decide([[0, 0, 2]] * 2)]
    assert mean_density(blocks, 0).tolist() == [[1, (1 / 4 + 1) / 2, 1 / 16]] * 2


def test_stages_are_layers_on_one_grid():
    a, b = decide([[0] * 3] * 2), decide([[2]], grid=(4, 4))
    assert [len(stage) for stage in split_stages([a, a, b, a])] == [2, 1, 1]


@pytest.mark.parametrize(
    'shape, grid, stride',
    [
        ((160, 224), (40, 56), 4),
        ((37, 50), (2, 2), 32),
        ((30, 42), (3, 3), 14),
        ((800, 1280), (25, 40), 32),
    ],
)
def test_strides(shape, grid, stride):
    assert stride_of(shape, grid) == stride
