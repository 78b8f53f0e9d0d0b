"""Times of several functions, measured in turn so that their ratios are meaningful.

The speed of a machine drifts. So every round runs all functions, in the opposite order of the round
before, and speed-ups are medians of the ratios within rounds.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence

import torch

MIN_SECONDS = 0.1  # of a measurement; a faster function is repeated


def ratios(over: Sequence[float], under: Sequence[float]) -> list[float]:
    """Ratio of two functions' times, round by round."""
    return [a / b for a, b in zip(over, under, strict=True)]


def time_in_turn(
    steps: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    on_progress: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Time functions that are warmed up.

    Args:
        steps: Functions by name.
        rounds: How often each is measured.
        device: Where they run.
        on_progress: Called once per function before the rounds and after each measurement, for a
            progress bar: ``len(steps) * (rounds + 1)`` times.

    Returns:
        Milliseconds per call, one for each round, by name.
    """
    repeats = {}
    for name, step in steps.items():
        repeats[name] = max(1, math.ceil(MIN_SECONDS / _seconds(step, 1, device)))
        on_progress()
    times = {name: [] for name in steps}
    for turn in range(rounds):
        for name in list(steps)[:: -1 if turn % 2 else 1]:
            times[name].append(1e3 * _seconds(steps[name], repeats[name], device))
            on_progress()
    return times


def _seconds(step: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Mean time of a call."""
    if device.type == 'cuda':
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        for _ in range(repeats):
            step()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / 1e3 / repeats
    started = time.perf_counter()
    for _ in range(repeats):
        step()
    return (time.perf_counter() - started) / repeats
