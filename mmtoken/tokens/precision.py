"""Mixed precision, switched off where numbers must be exact."""

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch


def full_precision(device: torch.device) -> AbstractContextManager:
    """Inside this context operations keep the types of their inputs, on one kind of device."""
    if _has_autocast(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


@lru_cache
def _has_autocast(device_type: str) -> bool:
    """Whether torch knows mixed precision there: not on meta, nor, in older ones, on MPS."""
    try:
        torch.autocast(device_type, enabled=False)
    except RuntimeError:
        return False
    return True
