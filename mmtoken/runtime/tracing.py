"""Code that ``torch.jit.trace`` must not record.

In a trace sizes are tensors. Values that depend on sizes alone are computed outside of the trace
and are constants in it.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def untraced() -> Iterator[None]:
    """Inside this context nothing is recorded."""
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)
    try:
        yield
    finally:
        torch._C._set_tracing_state(state)
