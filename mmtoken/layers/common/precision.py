"""Mixed precision, switched off where full precision is needed."""

from contextlib import AbstractContextManager, nullcontext

import torch


def _lacks_autocast(device_type: str) -> bool:
    try:
        torch.autocast(device_type, enabled=False)
    except RuntimeError:
        return True
    return False


# The meta device, and MPS in older versions of torch; torch.compile cannot trace the check.
WITHOUT_AUTOCAST = frozenset(filter(_lacks_autocast, ('meta', 'mps')))


def full_precision(device: torch.device) -> AbstractContextManager:
    """Inside this context operations on this kind of device keep the dtypes of their inputs."""
    if device.type in WITHOUT_AUTOCAST:
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
