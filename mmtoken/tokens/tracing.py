"""What ``torch.jit.trace`` must not record.

In a trace sizes are tensors, a new one at each look. What depends on them alone is worked out
outside of it, and is a constant inside.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def untraced() -> Iterator[None]:
    """Inside this context nothing is recorded."""
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)
    try:
        yield
    finally:
        torch._C._set_tracing_state(state)


def as_numbers(value):
    """Sizes that are tensors to the numbers they stand for, in tuples too."""
    if isinstance(value, Tensor):
        with untraced():
            return value.item()
    if isinstance(value, tuple):
        items = map(as_numbers, value)
        return value._make(items) if hasattr(value, '_make') else tuple(items)
    return value
