"""Cost, time and memory of several networks, measured in turn in one process."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from mmtoken.analysis.cost import Cost
from mmtoken.analysis.timing import time_in_turn

from .memory import peak_mb
from .parts import time_parts
from .profile import profile_step
from .step import Setting, make_images, make_step
from .targets import BenchmarkTarget

WARM_UP_CALLS = dict(cpu=2, cuda=20)


@dataclass(frozen=True)
class Measurement:
    """Results for one network.

    Attributes:
        cost: Of the forward pass, per image.
        times: Milliseconds per step, one for each round.
        peak_mb: Peak memory of a step in MiB; None where it cannot be measured.
        profile: Milliseconds per step by kind of work; None if not asked for.
        parts: Milliseconds of a forward pass by part of the model; None if not asked for, and for
            backbones, training and compiled models.
    """

    cost: Cost
    times: list[float]
    peak_mb: float | None
    profile: dict[str, float] | None
    parts: dict[str, float] | None


def count_progress(num_targets: int, rounds: int) -> int:
    """How often :func:`measure` calls ``on_progress``."""
    return num_targets * (rounds + 3)


def measure(
    targets: Mapping[str, BenchmarkTarget],
    setting: Setting,
    rounds: int = 10,
    profiled: bool = False,
    on_progress: Callable[[], object] = lambda: None,
) -> dict[str, Measurement]:
    """Measure networks.

    Args:
        targets: Networks by name.
        setting: How to run them.
        rounds: How often each is timed.
        profiled: Whether times by kind of work and by part of the model are wanted, too.
        on_progress: Called :func:`count_progress` times, for a progress bar.

    Raises:
        ValueError: A network that cannot be built or takes no routing override.
    """
    torch.set_num_threads(setting.threads)
    by_part = profiled and not (setting.train or setting.compiled)
    costs, steps, models = {}, {}, {}
    for name, target in targets.items():
        network = target.build().to(setting.device)
        costs[name] = target.measure_cost(network, make_images(target, setting).float())
        steps[name] = make_step(target, network, setting)
        if by_part and target.part == 'model':
            models[name] = network.model
        for _ in range(WARM_UP_CALLS[setting.device.type]):
            steps[name]()
        on_progress()
    times = time_in_turn(steps, rounds, setting.device, on_progress)
    results = {}
    for name, target in targets.items():
        profile = profile_step(steps[name], setting.device) if profiled else None
        model = models.get(name)
        parts = None if model is None else time_parts(steps[name], model, setting.device)
        peak = peak_mb(target, setting, steps[name])
        results[name] = Measurement(costs[name], times[name], peak, profile, parts)
        on_progress()
    return results
