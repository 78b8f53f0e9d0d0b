from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmtoken.layers.common.regions import (
    RegionLayout,
    all_cells,
    gate_per_cell,
    make_region_layout,
    plan_regions,
    pool_cells,
    pool_every_granularity,
    pool_regions,
    unpool_cells,
    unpool_every_granularity,
    unpool_regions,
)

CUTS = [
    ((1,), 1),
    ((1,), 4),
    ((1, 2), 2),
    ((1, 2), 4),
    ((1, 4), 4),
    ((1, 2, 4), 4),
    ((1, 2, 4), 8),
    ((1, 3), 3),
    ((1, 2, 3, 6), 6),
]


class Layout(NamedTuple):
    regions: RegionLayout
    choice: Tensor
    x: Tensor


@st.composite
def layouts(draw, most_extra=2):
    grid = draw(st.tuples(st.integers(1, 13), st.integers(1, 13)))
    sides, size = draw(st.sampled_from(CUTS))
    regions = make_region_layout(grid, sides, size, draw(st.integers(0, most_extra)))
    batch = draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    choice = torch.randint(len(sides), (batch, *regions.shape), generator=generator)
    length = regions.num_prefix_tokens + grid[0] * grid[1]
    x = torch.randn(batch, length, 5, generator=generator, dtype=torch.float64)
    return Layout(regions, choice, x)


def cells_of(regions, level):
    """Region of each cell of a granularity, and its tokens, one by one."""
    (height, width), side = regions.grid, regions.granularities[level]
    cells = []
    for top in range(0, height, side):
        for left in range(0, width, side):
            place = (top // regions.region_size, left // regions.region_size)
            tokens = [
                regions.num_prefix_tokens + y * width + x
                for y in range(top, min(top + side, height))
                for x in range(left, min(left + side, width))
            ]
            cells.append((place, tokens))
    return cells


def naive_queries(layout):
    """For each image the tokens of each of its queries."""
    regions = layout.regions
    queries = []
    for choice in layout.choice.tolist():
        image = [[i] for i in range(regions.num_prefix_tokens)]
        for level in range(len(regions.granularities)):
            image += [t for (r, c), t in cells_of(regions, level) if choice[r][c] == level]
        queries.append(image)
    return queries


@settings(max_examples=60, deadline=None)
@given(layouts())
def test_queries_are_means_of_cells(layout):
    plan = plan_regions(layout.choice, layout.regions)
    naive = naive_queries(layout)
    means = [layout.x[b, cell].mean(0) for b, image in enumerate(naive) for cell in image]
    pooled = pool_regions(layout.x, plan)
    torch.testing.assert_close(pooled, torch.stack(means), atol=1e-12, rtol=0)
    assert plan.queries.lengths == [len(image) for image in naive]
    images = [b for b, image in enumerate(naive) for _ in image]
    assert plan.queries.image.tolist() == images
    assert all(counts[0] == layout.regions.num_prefix_tokens for counts in plan.queries.counts)


@settings(max_examples=60, deadline=None)
@given(layouts())
def test_every_token_is_owned_by_the_one_query_whose_cell_holds_it(layout):
    owner = plan_regions(layout.choice, layout.regions).owner
    length, start = layout.x.shape[1], 0
    expected = torch.full_like(owner, -1)
    for b, image in enumerate(naive_queries(layout)):
        for query, tokens in enumerate(image, start):
            for token in tokens:
                assert expected[b * length + token] == -1
                expected[b * length + token] = query
        start += len(image)
    assert torch.equal(owner, expected)


@settings(max_examples=40, deadline=None)
@given(layouts())
def test_unpool_inverts_pool(layout):
    plan = plan_regions(layout.choice, layout.regions)
    updates = torch.randn(sum(plan.queries.lengths), 5, dtype=torch.float64)
    constant = unpool_regions(updates, plan)
    assert constant.shape == layout.x.shape
    torch.testing.assert_close(pool_regions(constant, plan), updates)


@settings(max_examples=40, deadline=None)
@given(layouts())
def test_cells_and_their_complement_are_all_cells(layout):
    queries = plan_regions(layout.choice, layout.regions).queries
    others, every = queries.complement, all_cells(layout.regions, len(layout.x))
    assert every.cells.tolist() == list(range(len(layout.x) * layout.regions.num_cells_total))
    assert every.lengths == [layout.regions.num_cells_total] * len(layout.x)
    for cells in (queries, others):
        assert (cells.cells.diff() > 0).all()
        assert cells.lengths == cells.image.bincount(minlength=len(layout.x)).tolist()
    assert torch.equal(torch.cat([queries.cells, others.cells]).sort().values, every.cells)
    for chosen, rest in zip(queries.counts, others.counts, strict=True):
        assert [a + b for a, b in zip(chosen, rest, strict=True)] == layout.regions.sizes
    # Region by region it is the choice that tells them apart.
    place = queries.cells % layout.regions.num_cells_total - layout.regions.num_prefix_tokens
    image, place = queries.image[place >= 0], place[place >= 0]
    levels = layout.choice.flatten(1)[image, layout.regions.region[place]]
    assert torch.equal(layout.regions.level[place], levels)


@settings(max_examples=40, deadline=None)
@given(layouts())
def test_regions_count_their_cells(layout):
    regions = layout.regions
    for level in range(len(regions.granularities)):
        expected = torch.zeros(regions.shape, dtype=torch.long)
        for (row, column), _ in cells_of(regions, level):
            expected[row, column] += 1
        assert torch.equal(regions.num_cells[:, level], expected.flatten())
    assert regions.num_cells_total == sum(regions.sizes)


@settings(max_examples=40, deadline=None)
@given(layouts(most_extra=0))
def test_centers_are_means_of_places(layout):
    width = layout.regions.grid[1]
    place = torch.tensor([(i % width, i // width) for i in range(layout.x.shape[1])]).double()
    place = place.expand(len(layout.x), -1, -1).contiguous()
    plan = plan_regions(layout.choice, layout.regions)
    assert torch.equal(plan.queries.center.double(), pool_regions(place, plan))


@settings(max_examples=40, deadline=None)
@given(layouts())
def test_batch_is_image_after_image(layout):
    together = plan_regions(layout.choice, layout.regions)
    cells, owners, start = [], [], 0
    for b, choice in enumerate(layout.choice):
        alone = plan_regions(choice[None], layout.regions)
        assert alone.queries.counts == together.queries.counts[b : b + 1]
        cells.append(alone.queries.cells + b * layout.regions.num_cells_total)
        owners.append(alone.owner + start)
        start += sum(alone.queries.lengths)
    assert torch.equal(torch.cat(cells), together.queries.cells)
    assert torch.equal(torch.cat(owners), together.owner)


@settings(max_examples=40, deadline=None)
@given(layouts())
def test_all_granularities_at_once(layout):
    """Both directions, and their gradients, from the cell of each token."""
    regions, x = layout.regions, layout.x.requires_grad_()
    pooled = pool_every_granularity(x, regions)
    weights = torch.randn_like(pooled)
    share = torch.zeros(regions.num_cells_total, x.shape[1], dtype=x.dtype)  # of a token in a cell
    share.scatter_(0, regions.cell_of_token, 1)
    means = share / share.sum(dim=1, keepdim=True)
    torch.testing.assert_close(pooled, means @ x)
    (grad,) = torch.autograd.grad(pooled, x, weights)
    torch.testing.assert_close(grad, means.T @ weights)

    weights.requires_grad_()
    tokens = unpool_every_granularity(weights, regions)
    torch.testing.assert_close(tokens, share.T @ weights)
    (grad,) = torch.autograd.grad(tokens, weights, x)
    torch.testing.assert_close(grad, share @ x)


def test_levels_of_cells():
    regions = make_region_layout((2, 4), (1, 2), 2, num_prefix_tokens=1)
    cells = plan_regions(torch.tensor([[[1, 0]], [[0, 0]]]), regions).queries
    parts = [(image, k, part, places.tolist()) for image, k, part, places in cells.levels()]
    assert parts == [
        (0, 0, slice(0, 1), [0]),
        (0, 1, slice(1, 5), [2, 3, 6, 7]),
        (0, 2, slice(5, 6), [0]),
        (1, 0, slice(6, 7), [0]),
        (1, 1, slice(7, 15), list(range(8))),
        (1, 2, slice(15, 15), []),
    ]


@settings(max_examples=40, deadline=None)
@given(layouts())
def test_gates_of_cells_choose_the_queries(layout):
    regions = layout.regions
    gates = torch.nn.functional.one_hot(layout.choice, len(regions.granularities)).float()
    chosen = gate_per_cell(gates, regions)
    assert chosen.shape == (len(layout.x), regions.num_cells_total, 1)
    cells = plan_regions(layout.choice, regions).queries.cells
    assert torch.equal(chosen.flatten().nonzero().flatten(), cells)


@pytest.mark.parametrize('side', [1, 2, 3, 5])
def test_cells_are_repeated_over_their_tokens(side):
    x = torch.randn(2, 7, 4, 3)
    repeated = unpool_cells(pool_cells(x, side), side, (7, 4))
    for row in range(7):
        for column in range(4):
            top, left = row // side * side, column // side * side
            mean = x[:, top : top + side, left : left + side].mean(dim=(1, 2))
            torch.testing.assert_close(repeated[:, row, column], mean)


def test_queries_of_a_region_of_each_kind():
    regions = make_region_layout((4, 12), (1, 2, 4), 4, num_prefix_tokens=1)
    plan = plan_regions(torch.tensor([[[0, 1, 2]], [[2, 2, 2]]]), regions)
    assert plan.queries.counts == [[1, 16, 4, 1], [1, 0, 0, 3]]
    assert plan.queries.lengths == [22, 4]
    assert plan.owner[:13].tolist() == [0, 1, 2, 3, 4, 17, 17, 18, 18, 21, 21, 21, 21]
