"""Where the time of a forward pass goes, by part of the model: backbone, neck, heads."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

REST = 'rest'  # outside of the parts' forward methods, such as non-maximum suppression


def time_parts(
    step: Callable[[], object], model: nn.Module, device: torch.device, calls: int = 3
) -> dict[str, float]:
    """Milliseconds of a call in the ``forward`` of each child of the model, and of the rest.

    Children that are not called are left out.

    Args:
        step: Runs the model, not compiled; warmed up.
        model: No child of it calls another one.
        device: Where it runs.
        calls: That are averaged.
    """
    times = Counter()  # seconds
    with ExitStack() as stack:
        for name, part in model.named_children():
            stack.enter_context(_clocked(part, name, times, device))
        started = _now(device)
        for _ in range(calls):
            step()
        whole = _now(device) - started
    times[REST] = whole - times.total()
    return {name: 1e3 * seconds / calls for name, seconds in times.items()}


@contextmanager
def _clocked(part: nn.Module, name: str, times: Counter, device: torch.device) -> Iterator[None]:
    """Add the seconds in ``part.forward``: models call some heads by it, without hooks."""
    forward = part.forward

    def timed(*args, **kwargs):
        started = _now(device)
        outputs = forward(*args, **kwargs)
        times[name] += _now(device) - started
        return outputs

    part.forward = timed
    try:
        yield
    finally:
        del part.forward


def _now(device: torch.device) -> float:
    """Seconds, when the device has finished."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    return time.perf_counter()
