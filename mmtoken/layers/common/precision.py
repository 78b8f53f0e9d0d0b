"""Mixed precision, switched off where numbers must be exact."""

from contextlib import AbstractContextManager, nullcontext

import torch


def _lacks_autocast(device_type: str) -> bool:
    try:
        torch.autocast(device_type, enabled=False)
    except RuntimeError:
        return True
    return False


# The meta device, and MPS in older versions of torch. Looked up here, for torch.compile cannot.
WITHOUT_AUTOCAST = frozenset(filter(_lacks_autocast, ('meta', 'mps')))


def full_precision(device: torch.device) -> AbstractContextManager:
    """Inside this context operations keep the types of their inputs, on one kind of device."""
    if device.type in WITHOUT_AUTOCAST:
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
