"""Records of routing decisions and of tokens, for visualization and statistics."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor

from .reference import is_compiling


class RoutingDecision(NamedTuple):
    """The decision of one router for a batch.

    Attributes:
        choice: Index of each region's choice, ``(B, Hr, Wr)``.
        granularities: Side of a token for each choice, in tokens of the grid.
        region_size: Side of a region, in tokens of the grid.
        grid: ``(H, W)`` of the dense map, in tokens.
        padding: Regions that are padding, ``(B, Hr, Wr)``; None if unknown.
        per_network: Whether it holds for the whole network; otherwise for one of its blocks.
    """

    choice: Tensor
    granularities: tuple[int, ...]
    region_size: int
    grid: tuple[int, int]
    padding: Tensor | None
    per_network: bool = False


class TokenGroups(NamedTuple):
    """The tokens that a method makes of a batch, whether it chooses them or not.

    Attributes:
        name: What the tokens are, such as ``'pooled'``.
        owner: The token of each place of the dense grid, ``(B, H, W)``: any numbers, the same for
            places of one token of an image.
        complete: Whether these are all tokens of their kind, to be compared with the dense ones.
        cells: Side of the planes that a token keeps of its patch, in cells; 1 for none.
    """

    name: str
    owner: Tensor
    complete: bool = True
    cells: int = 1


Record = RoutingDecision | TokenGroups
_records: ContextVar[tuple[tuple[type, list], ...]] = ContextVar('mmtoken_records', default=())


@contextmanager
def record_routing() -> Iterator[list[RoutingDecision]]:
    """Collect the decisions made inside this context, in the order of the layers."""
    with _recorded(RoutingDecision) as record:
        yield record


@contextmanager
def record_tokens() -> Iterator[list[Record]]:
    """Collect the tokens of all methods: decisions of those that choose, groups of the others.

    The groups cost time, so that this is for pictures and not for measurements.
    """
    with _recorded(Record) as record:
        yield record


@contextmanager
def _recorded(kinds: type) -> Iterator[list]:
    record = []
    token = _records.set((*_records.get(), (kinds, record)))
    try:
        yield record
    finally:
        _records.reset(token)


@torch.compiler.disable  # which cannot trace a ContextVar
def record_decision(decision: Record) -> None:
    """Add a decision to all open records."""
    for kinds, record in _records.get():
        if isinstance(decision, kinds):
            record.append(decision)


def record_groups(make: Callable[[], TokenGroups]) -> None:
    """Add groups to all open records of :func:`record_tokens`; ``make`` is called for these only.

    Compiled and exported networks record none.
    """
    if not is_compiling() and any(kinds is Record for kinds, _ in _records.get()):
        with torch.no_grad():
            record_decision(make())


def record_rectangles(
    name: str,
    batch: int,
    grid: tuple[int, int],
    token_of: Callable[[Tensor, int], Tensor] = lambda place, side: place,
    cells: int = 1,
) -> None:
    """:func:`record_groups` of tokens that stand for rectangles, the same in every image.

    Args:
        name, cells: Of the groups.
        batch: Images.
        grid: ``(H, W)``, in places.
        token_of: The token, counted along an axis, of places ``(side,)`` on an axis of ``side``
            places; by default each place has one.
    """

    def make() -> TokenGroups:
        rows, columns = (token_of(torch.arange(side), side) for side in grid)
        owner = rows[:, None] * grid[1] + columns
        return TokenGroups(name, owner.expand(batch, -1, -1), cells=cells)

    record_groups(make)
