"""Times of several functions, measured in turn so that their ratios mean something.

A machine's speed drifts while it is measured. So every round runs all functions, each round in the
opposite order of the one before, and speed-ups are the median of the ratios within rounds.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

MIN_SECONDS = 0.1  # a function is called again until a measurement lasts that long


class Spread(NamedTuple):
    """Median, quartiles and extremes of the rounds."""

    median: float
    q1: float
    q3: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> 'Spread':
        """Summarise the values of all rounds."""
        return cls(*(float(v) for v in np.percentile(values, [50, 25, 75, 0, 100])))


def ratios(over: Sequence[float], under: Sequence[float]) -> list[float]:
    """Ratio of two functions' times, round by round."""
    return [a / b for a, b in zip(over, under, strict=True)]


def time_in_turn(
    steps: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    advance: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Time functions that are warmed up already.

    Args:
        steps: What to time, by name.
        rounds: How often each is measured.
        device: Where they run.
        advance: Called after each measurement and once per function before the first, for a
            progress bar: ``len(steps) * (rounds + 1)`` times.

    Returns:
        Milliseconds a call, one for each round, by name.
    """
    repeats = {}
    for name, step in steps.items():
        repeats[name] = max(1, math.ceil(MIN_SECONDS / _seconds(step, 1, device)))
        advance()
    times = {name: [] for name in steps}
    for turn in range(rounds):
        for name in list(steps)[:: -1 if turn % 2 else 1]:
            times[name].append(1e3 * _seconds(steps[name], repeats[name], device))
            advance()
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
