"""Records of routing decisions, for visualization and statistics."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor


class RoutingDecision(NamedTuple):
    """The decision of one router for a batch.

    Attributes:
        choice: Index of each region's choice, ``(B, Hr, Wr)``.
        granularities: Side of a token for each choice, in tokens of the grid.
        region_size: Side of a region, in tokens of the grid.
        grid: ``(H, W)`` of the dense map, in tokens.
        padding: Regions that are padding, ``(B, Hr, Wr)``; None if unknown.
        once: Whether it holds for the whole network; otherwise for one of its blocks.
    """

    choice: Tensor
    granularities: tuple[int, ...]
    region_size: int
    grid: tuple[int, int]
    padding: Tensor | None
    per_network: bool = False


_records: ContextVar[tuple[list[RoutingDecision], ...]] = ContextVar('mmtoken_records', default=())


@contextmanager
def record_routing() -> Iterator[list[RoutingDecision]]:
    """Collect the decisions made inside this context, in the order of the layers."""
    record: list[RoutingDecision] = []
    token = _records.set((*_records.get(), record))
    try:
        yield record
    finally:
        _records.reset(token)


@torch.compiler.disable  # which cannot trace a ContextVar
def record_decision(decision: RoutingDecision) -> None:
    """Add a decision to all open records."""
    for record in _records.get():
        record.append(decision)
