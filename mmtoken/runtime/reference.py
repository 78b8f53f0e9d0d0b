"""Choose the obvious form of every mechanism instead of its fast one.

Each mechanism has a reference, which says plainly what is computed, and a fast path that gives the
same result. The reference is what tests compare with and what costs are counted on. It is also what
``torch.jit.trace`` records, and with it the libraries' counters of operations, which trace: so they
count what the method says, and a traced module has no steps that only one machine gains from.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

# A plain variable, which torch.compile can guard on; it cannot trace a ContextVar.
_reference = False


@contextmanager
def reference_path() -> Iterator[None]:
    """Inside this context all mechanisms take their reference form, in every thread."""
    global _reference
    before, _reference = _reference, True
    try:
        yield
    finally:
        _reference = before


def on_reference_path() -> bool:
    """Whether :func:`reference_path` is in force, or a trace is being recorded."""
    return _reference or torch.jit.is_tracing()
