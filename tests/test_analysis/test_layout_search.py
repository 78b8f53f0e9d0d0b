"""Layouts stay legal and within the budget, and what is said to be all of them is."""

import random
from collections import Counter
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtoken.analysis import count_macs
from mmtoken.analysis.layout_search import (
    LayerCosts,
    LayoutSpace,
    evolve,
    measure_layer_costs,
    plain_layout,
)
from mmtoken.backbones.psvit import PSViT
from mmtoken.runtime.reference import reference_path

TINY = LayoutSpace((2, 3), depth=4, max_group=2)
COSTS = LayerCosts(fixed=10, leading=(5, 4, 3), following=(4, 2, 1))


@st.composite
def spaces(draw):
    max_depths = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    depth = draw(st.integers(len(max_depths), sum(max_depths)))
    return LayoutSpace(max_depths, depth, draw(st.integers(1, 4)))


def groupings(depth, max_group):
    """By trying all there could be."""
    sizes = range(1, max_group + 1)
    return [g for n in range(1, depth + 1) for g in product(sizes, repeat=n) if sum(g) == depth]


def all_layouts(space):
    groups = [
        [g for d in range(1, m + 1) for g in groupings(d, space.max_group)]
        for m in space.max_depths
    ]
    return {layout for layout in product(*groups) if sum(map(sum, layout)) == space.depth}


def test_a_tiny_space():
    # Depths 1 + 3 and 2 + 2; three layers in pairs at most make 1 1 1, 1 2 and 2 1.
    assert all_layouts(TINY) == {
        ((1,), (1, 1, 1)), ((1,), (1, 2)), ((1,), (2, 1)),
        ((1, 1), (1, 1)), ((1, 1), (2,)), ((2,), (1, 1)), ((2,), (2,)),
    }  # fmt: skip
    assert TINY.size == 7


@settings(max_examples=30, deadline=None)
@given(spaces())
def test_size_and_membership(space):
    everything = all_layouts(space)
    assert space.size == len(everything)
    assert all(layout in space for layout in everything)


@pytest.mark.parametrize(
    'layout',
    [((2,),), ((2,), (1,)), ((1, 1, 1), (1,)), ((), (2, 2)), ((2,), (3,)), ((2,), (0, 2))],
)
def test_what_is_not_a_layout(layout):
    assert layout not in TINY


def test_layouts_are_equally_likely():
    rng = random.Random(0)
    drawn = Counter(TINY.draw(rng) for _ in range(7000))
    assert drawn.keys() == all_layouts(TINY)
    assert all(abs(number - 1000) < 120 for number in drawn.values())  # 4 standard deviations


@settings(max_examples=60, deadline=None)
@given(spaces(), st.integers(0, 999))
def test_steps_and_crossings_are_layouts(space, seed):
    rng = random.Random(seed)
    first, second = space.draw(rng), space.draw(rng)
    assert first in space
    steps, crossings = space.neighbours(first), space.crossings(first, second)
    assert all(layout in space and layout != first for layout in steps)
    assert all(layout in space and layout not in (first, second) for layout in crossings)
    assert all(space.even(group)[0] in space for group in range(1, space.max_group + 1))


def test_steps():
    space = LayoutSpace((4, 4), depth=6, max_group=3)
    assert set(space.neighbours(((2, 1), (3,)))) == {
        ((1, 1, 1), (3,)), ((2, 1), (1, 2)), ((2, 1), (2, 1)),  # split
        ((3,), (3,)),  # merged
        ((2,), (1, 3)), ((2, 1, 1), (2,)),  # pooled a layer earlier, later
    }  # fmt: skip


@settings(max_examples=20, deadline=None)
@given(spaces())
def test_steps_lead_everywhere(space):
    everything = all_layouts(space)
    for start in sorted(everything)[:3]:
        reached, waiting = {start}, [start]
        while waiting:
            new = set(space.neighbours(waiting.pop())) - reached
            reached |= new
            waiting += new
        assert reached == everything


def test_poolings_pass_a_stage_that_is_full():
    space = LayoutSpace((3, 1, 3), depth=5)
    assert set(space.neighbours(((2,), (1,), (2,)))) == {
        ((1, 1), (1,), (2,)), ((2,), (1,), (1, 1)),
        ((1,), (1,), (1, 2)), ((2, 1), (1,), (1,)),
    }  # fmt: skip


def test_crossings_begin_as_one_and_end_as_the_other():
    space = LayoutSpace((4, 4), depth=6, max_group=3)
    assert set(space.crossings(((3, 1), (2,)), ((1, 1), (2, 2)))) == {
        ((2,), (2, 2)), ((3,), (1, 2)), ((3, 1), (1, 1)),
    }  # fmt: skip


@pytest.mark.parametrize('arguments', [((2, 3), 1), ((2, 3), 6), ((2, 3), 4, 0), ((0, 3), 2)])
def test_empty_spaces_are_refused(arguments):
    with pytest.raises(ValueError, match='depth must be from'):
        LayoutSpace(*arguments)


SPACE = LayoutSpace((4, 6, 6), depth=8)
LAYOUTS = all_layouts(SPACE)


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 999), st.integers(24, 40))
def test_evolution(seed, budget):
    """Stays within the budget, tries all or as many as asked for, none twice, and repeats."""
    tried = []

    def score(layout):
        tried.append(layout)
        return len(layout[1]) - len(layout[0])

    def allowed(layout):
        return COSTS.macs(layout) <= budget

    found = evolve(SPACE, score, allowed, population=8, generations=3, parents=3, seed=seed)
    assert tried == list(found) and len(set(tried)) == len(tried)
    assert all(layout in SPACE and allowed(layout) for layout in found)
    assert len(found) == min(sum(map(allowed, LAYOUTS)), 24)
    again = evolve(SPACE, score, allowed, population=8, generations=3, parents=3, seed=seed)
    assert list(again.items()) == list(found.items())
    shorter = evolve(SPACE, score, allowed, population=8, generations=2, parents=3, seed=seed)
    assert list(shorter) == list(found)[:16]


def test_evolution_finds_more_than_as_many_draws():
    space = LayoutSpace((6, 8, 8), depth=12)
    goal = ((2, 1), (1, 3, 1), (3, 1))

    def score(layout):
        """Steps that lie between poolings, and groups that differ."""
        depths = zip(map(sum, layout), map(sum, goal), strict=True)
        return -sum(abs(a - b) for a, b in depths) - len({*enumerate(layout)} ^ {*enumerate(goal)})

    def best_of(population, generations, seed):
        found = evolve(space, score, lambda layout: True, population, generations, seed=seed)
        assert len(found) == 60
        return max(found.values())

    evolved, drawn = (
        [best_of(*counts, seed) for seed in range(10)] for counts in ((12, 5), (60, 1))
    )
    assert sum(evolved) > sum(drawn)


def test_evolution_ends_when_all_is_tried():
    found = evolve(TINY, lambda layout: 0.0, lambda layout: True, population=4, generations=3)
    assert set(found) == all_layouts(TINY)
    assert evolve(TINY, lambda layout: 0.0, lambda layout: False) == {}


def test_plain_layouts():
    """Of 16 layers at most, half: 2, 3 and 3."""
    assert plain_layout(SPACE, 1, COSTS, 99) == ((1, 1), (1, 1, 1), (1, 1, 1))
    pairs = plain_layout(SPACE, 2, COSTS, 99)
    assert pairs == ((2,), (2, 1), (2, 1)) and COSTS.macs(pairs) == 10 + 9 + 10 + 7
    # Cheaper ones are less balanced; of those beyond the budget, the balanced one is taken.
    cheap = plain_layout(SPACE, 2, COSTS, 33)
    assert cheap in SPACE and COSTS.macs(cheap) <= 33
    assert plain_layout(SPACE, 2, COSTS, 5) == pairs


@pytest.mark.parametrize('depths', [(2, 4, 3), (1, 2)])
def test_costs_are_those_that_are_counted(depths):
    stages = [(16 * 2**i, 2, (1,) * depth) for i, depth in enumerate(depths)]
    network = PSViT(
        arch=dict(stages=stages), sharing=None, patch_size=4,
        window_sizes=(4, *[None] * (len(depths) - 1)), out_indices=range(len(depths)),
    ).eval()  # fmt: skip
    costs = measure_layer_costs(network, (40, 56))
    assert [stage.groups for stage in network.layers] == [groups for _, _, groups in stages]
    rng = random.Random(0)
    for depth in range(len(depths), sum(depths) + 1):
        layout = LayoutSpace(depths, depth).draw(rng)
        network.set_layout(layout)
        with reference_path():
            assert count_macs(network, torch.zeros(1, 3, 40, 56)) == costs.macs(layout)
