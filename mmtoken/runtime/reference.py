"""Choose the reference form of every mechanism instead of its fast one.

Each mechanism has a reference, which says plainly what is computed, and a fast path that gives the
same result. Tests compare with the reference and costs are counted on it. ``torch.jit.trace``
records it too, and with it the operation counters of other libraries, which trace: they count what
the method says, and a traced module has no steps that only one machine gains from.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from . import torch_private

_reference = ContextVar('mmtoken_reference', default=False)


@contextmanager
def reference_path() -> Iterator[None]:
    """Inside this context all mechanisms take their reference form; other threads do not."""
    token = _reference.set(True)
    try:
        yield
    finally:
        _reference.reset(token)


def on_reference_path() -> bool:
    """Whether :func:`reference_path` is in force, or a trace is being recorded."""
    if is_compiling():  # torch.compile cannot trace a ContextVar
        return False
    return _reference.get() or torch.jit.is_tracing()


def is_compiling() -> bool:
    """Whether ``torch.compile`` or ``torch.export`` is tracing."""
    return torch_private.is_compiling()
