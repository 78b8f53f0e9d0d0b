"""Search for the layout of a PSViT: where tokens are pooled, and which layers share a map.

PSViT (arXiv 2108.03428) searches for both in a compact set of combinations. No text that says how
was at hand: the set, its moves and the evolution here are ours.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import groupby, permutations, product
from math import prod

import torch
from torch import nn

from ..runtime.reference import reference_path
from .cost import macs_by_stage

# For each stage the sizes of its groups: ((2, 1), (3,)) are six layers, pooled behind the third.
Layout = tuple[tuple[int, ...], ...]

TRIES = 10_000  # for a layout that is new and within the budget
TRIES_FOR_A_CHILD = 100  # of the best ones; then any will do
TRIES_A_STEP = 20


@dataclass(frozen=True)
class LayoutSpace:
    """All layouts of a number of layers.

    Attributes:
        max_depths: The most layers that each stage can have; it has one at least.
        depth: Layers in all.
        max_group: The most layers that share a map.

    Raises:
        ValueError: There is no such layout.
    """

    max_depths: tuple[int, ...]
    depth: int
    max_group: int = 3

    def __post_init__(self) -> None:
        least, most = len(self.max_depths), sum(self.max_depths)
        if not least <= self.depth <= most or self.max_group < 1 or min(self.max_depths) < 1:
            raise ValueError(
                f'depth must be from {least} to {most}, layers of stages that have at most '
                f'{self.max_depths}, and max_group 1 or more; got depth {self.depth} and '
                f'max_group {self.max_group}'
            )

    def __contains__(self, layout: Layout) -> bool:
        depths = [sum(groups) for groups in layout]
        return (
            len(layout) == len(self.max_depths)
            and sum(depths) == self.depth
            and all(1 <= d <= most for d, most in zip(depths, self.max_depths, strict=True))
            and all(1 <= size <= self.max_group for groups in layout for size in groups)
        )

    @cached_property
    def depths(self) -> list[tuple[int, ...]]:
        """All ways to share the layers out among stages."""
        depths = product(*(range(1, most + 1) for most in self.max_depths))
        return [stages for stages in depths if sum(stages) == self.depth]

    @cached_property
    def weights(self) -> list[int]:
        """How many layouts each of :attr:`depths` has."""
        return [prod(num_groupings(d, self.max_group) for d in stages) for stages in self.depths]

    @property
    def size(self) -> int:
        """How many layouts there are."""
        return sum(self.weights)

    def draw(self, rng: random.Random) -> Layout:
        """One of all layouts, each as likely as any other."""
        (depths,) = rng.choices(self.depths, self.weights)
        return tuple(draw_grouping(depth, self.max_group, rng) for depth in depths)

    def even(self, group: int) -> list[Layout]:
        """Layouts with groups of one size, but for a smaller last one where a stage has a rest."""
        return [
            tuple((group,) * (d // group) + ((d % group,) if d % group else ()) for d in stages)
            for stages in self.depths
        ]

    def neighbours(self, layout: Layout) -> list[Layout]:
        """Layouts one step away: a group split, two merged, or a pooling moved by a layer.

        Poolings that follow each other may move together, so that one stage gains a layer and
        another one loses it. The new layer is a group of its own, next to the pooling. From any
        layout there is a way to any other.
        """
        found = []
        for i, groups in enumerate(layout):
            for j, size in enumerate(groups):
                before, after = groups[:j], groups[j + 1 :]
                changed = [(*before, k, size - k, *after) for k in range(1, size)]
                if after:
                    changed.append((*before, size + after[0], *after[1:]))
                found += [(*layout[:i], new, *layout[i + 1 :]) for new in changed]
        for i, j in permutations(range(len(layout)), 2):
            stages = list(layout)
            if i < j:
                stages[i], stages[j] = _drop_last(stages[i]), (1, *stages[j])
            else:
                stages[i], stages[j] = _drop_last(stages[i][::-1])[::-1], (*stages[j], 1)
            found.append(tuple(stages))
        return [new for new in found if new in self]

    def crossings(self, first: Layout, second: Layout) -> list[Layout]:
        """Layouts that begin with the first layers of one and go on with the last of another.

        Groups that the cut goes through are smaller than they were. Layouts that equal one of the
        two are left out.
        """
        first_layers, second_layers = _layers(first, 'first'), _layers(second, 'second')
        found = []
        for cut in range(1, self.depth):
            child = _layout(first_layers[:cut] + second_layers[cut:])
            if child in self and child not in (first, second):
                found.append(child)
        return found


@cache
def num_groupings(layers: int, max_group: int) -> int:
    """In how many ways layers that follow each other can be grouped."""
    if layers == 0:
        return 1
    sizes = range(1, min(layers, max_group) + 1)
    return sum(num_groupings(layers - size, max_group) for size in sizes)


def draw_grouping(layers: int, max_group: int, rng: random.Random) -> tuple[int, ...]:
    """One of all groupings, each as likely as any other."""
    groups = []
    while layers:
        sizes = range(1, min(layers, max_group) + 1)
        weights = [num_groupings(layers - size, max_group) for size in sizes]
        groups += rng.choices(sizes, weights)
        layers -= groups[-1]
    return tuple(groups)


def _drop_last(groups: tuple[int, ...]) -> tuple[int, ...]:
    """Without the last layer."""
    return (*groups[:-1], groups[-1] - 1) if groups[-1] > 1 else groups[:-1]


def _layers(layout: Layout, owner: str) -> list[tuple[int, str, int]]:
    """The stage of each layer, whose layer it is, and the number of its group."""
    return [
        (stage, owner, group)
        for stage, groups in enumerate(layout)
        for group, size in enumerate(groups)
        for _ in range(size)
    ]


def _layout(layers: list[tuple[int, str, int]]) -> Layout:
    """Inverse of :func:`_layers`."""
    stages = (list(stage) for _, stage in groupby(layers, key=lambda layer: layer[0]))
    return tuple(tuple(len(list(group)) for _, group in groupby(stage)) for stage in stages)


@dataclass(frozen=True)
class LayerCosts:
    """Multiply-accumulates of a PSViT by what its layout is made of, for one image.

    Attributes:
        fixed: What every layout has.
        leading: A layer of each stage that computes a map.
        following: A layer of each stage that uses another's.
    """

    fixed: int
    leading: tuple[int, ...]
    following: tuple[int, ...]

    def macs(self, layout: Layout) -> int:
        """Multiply-accumulates of a layout."""
        return self.fixed + sum(
            len(groups) * leading + (sum(groups) - len(groups)) * following
            for groups, leading, following in zip(layout, self.leading, self.following, strict=True)
        )


def measure_layer_costs(backbone: nn.Module, shape: tuple[int, int]) -> LayerCosts:
    """Count three layouts on the reference path, and take their differences.

    Args:
        backbone: A :class:`~mmtoken.backbones.psvit.PSViT` built with ``sharing=None``, in eval
            mode. It has no other layout afterwards.
        shape: Height and width of the image.
    """
    images = torch.zeros(1, 3, *shape)
    deep = [len(stage.blocks) > 1 for stage in backbone.layers]

    def count(groups: tuple[int, ...]) -> list[int]:
        """With these groups where a stage has the layers for them: of each stage, and of all."""
        backbone.set_layout([groups if more else (1,) for more in deep])
        with reference_path():
            parts = macs_by_stage(backbone, images)
        totals = {part: sum(kinds.values()) for part, kinds in parts.items()}
        return [*(totals[f'layers.{i}'] for i in range(len(deep))), sum(totals.values())]

    before = [stage.groups for stage in backbone.layers]
    try:
        *one, whole = count((1,))
        *two, _ = count((1, 1))
        *shared, _ = count((2,))
    finally:
        backbone.set_layout(before)
    leading = tuple(a - b for a, b in zip(two, one, strict=True))
    following = tuple(a - b for a, b in zip(shared, one, strict=True))
    return LayerCosts(whole - sum(leading), leading, following)


def plain_layout(space: LayoutSpace, group: int, costs: LayerCosts, budget: float) -> Layout:
    """A layout that nobody has to search for, to compare with.

    All groups are of one size, as far as that goes, and the stages as deep in proportion as they
    can be at most: as near to this as the budget allows, or beyond it where no such layout is
    within.
    """
    share = space.depth / sum(space.max_depths)

    def badness(layout: Layout) -> tuple[bool, float, int]:
        depths = map(sum, layout)
        off = sum(abs(d - share * most) for d, most in zip(depths, space.max_depths, strict=True))
        return costs.macs(layout) > budget, off, costs.macs(layout)

    return min(space.even(group), key=badness)


def evolve(
    space: LayoutSpace,
    score: Callable[[Layout], float],
    allowed: Callable[[Layout], bool],
    population: int = 16,
    generations: int = 6,
    parents: int = 4,
    seed: int = 0,
) -> dict[Layout, float]:
    """Look for a layout with a high score.

    The first generation is drawn from the space. Of each further one, half are a step away from one
    of the best layouts so far, half are crossings of two of them. No layout is scored twice, and
    with the same seed and the same scores the same layouts are, in the same order.

    Args:
        space: Layouts there are.
        score: What is to be high.
        allowed: Which layouts can be scored, such as those within a budget.
        population: Layouts of a generation.
        generations: How many, the first included.
        parents: How many of the best lead to the next generation.
        seed: Of all that is drawn.

    Returns:
        Scores of the layouts, in the order in which they were tried. They are fewer than
        ``population * generations`` where no more were found to try.
    """
    rng = random.Random(seed)
    scores: dict[Layout, float] = {}
    for _ in range(generations):
        best = sorted(scores, key=scores.get, reverse=True)[:parents]
        for _ in range(population):
            layout = _new_layout(space, best, lambda x: x not in scores and allowed(x), rng)
            if layout is None:
                return scores
            scores[layout] = score(layout)
    return scores


def _new_layout(
    space: LayoutSpace, best: list[Layout], wanted: Callable[[Layout], bool], rng: random.Random
) -> Layout | None:
    """A child of the best, further away from them the longer none is found, or else any layout."""
    crossed = rng.random() < 0.5
    for attempt in range(TRIES):
        if best and attempt < TRIES_FOR_A_CHILD:
            layout, other = rng.choice(best), rng.choice(best)
            crossings = space.crossings(layout, other) if crossed else []
            layout = rng.choice(crossings or [layout])
            for _ in range(attempt // TRIES_A_STEP + (not crossings)):
                layout = rng.choice(space.neighbours(layout) or [layout])
        else:
            layout = space.draw(rng)
        if wanted(layout):
            return layout
    return None
