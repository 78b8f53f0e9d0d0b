"""Cost, time and memory of several networks, measured in one process and in turn."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from .cost import Cost, measure_cost
from .memory import peak_mb_on_cpu, peak_mb_on_cuda
from .step import make_images, make_step
from .subject import Subject
from .timing import time_in_turn

WARM_UP_CALLS = dict(cpu=2, cuda=20)


@dataclass(frozen=True)
class Setting:
    """How networks are run.

    Attributes:
        shape: Height and width of the images.
        batch_size: Images in a batch.
        device: Where.
        dtype: Precision; see :func:`~mmtoken.analysis.step.make_step`.
        train: Training steps instead of forward passes.
        compiled: Through ``torch.compile``.
        threads: Of torch, on the CPU.
        rounds: How often each network is timed.
    """

    shape: tuple[int, int]
    batch_size: int = 1
    device: torch.device = torch.device('cpu')
    dtype: torch.dtype = torch.float32
    train: bool = False
    compiled: bool = False
    threads: int = 1
    rounds: int = 10


@dataclass(frozen=True)
class Measurement:
    """What one network costs.

    Attributes:
        cost: Of the forward pass, for one image, the mean over the batch.
        times: Milliseconds a step, one for each round.
        peak_mb: Peak memory of a step; None where the system does not tell.
    """

    cost: Cost
    times: list[float]
    peak_mb: float | None


def count_advances(num_subjects: int, rounds: int) -> int:
    """How often :func:`compare` reports progress."""
    return num_subjects * (rounds + 3)


def compare(
    subjects: Mapping[str, Subject],
    setting: Setting,
    advance: Callable[[], object] = lambda: None,
) -> dict[str, Measurement]:
    """Measure networks.

    Args:
        subjects: What to measure, by name.
        setting: How to run them.
        advance: Called :func:`count_advances` times, for a progress bar.

    Raises:
        ValueError: A routing override that does not suit its network.
    """
    torch.set_num_threads(setting.threads)
    device = setting.device
    costs, steps = {}, {}
    for name, subject in subjects.items():
        network = subject.build().to(device)
        images = make_images(
            setting.batch_size, setting.shape, setting.dtype, device, subject.in_channels
        )
        inside = subject.overriding
        costs[name] = measure_cost(
            network, images.float(), batch_size=setting.batch_size, inside=inside
        )
        check_routing(subject, costs[name])
        steps[name] = make_step(
            network, images, setting.train, setting.compiled, subject.mixed, inside
        )
        for _ in range(WARM_UP_CALLS[device.type]):
            steps[name]()
        advance()
    times = time_in_turn(steps, setting.rounds, device, advance)
    peaks = {}
    for name, subject in subjects.items():
        peaks[name] = _peak_mb(subject, steps[name], setting)
        advance()
    return {name: Measurement(costs[name], times[name], peaks[name]) for name in subjects}


def check_routing(subject: Subject, cost: Cost) -> None:
    """Refuse to override what does not choose.

    Raises:
        ValueError: An override for a network without routers.
    """
    if subject.routing and cost.query_ratio is None:
        raise ValueError(
            f'{subject.name} has no routers whose {next(iter(subject.routing))} could be overridden'
        )


def _peak_mb(subject: Subject, step: Callable[[], None], setting: Setting) -> float | None:
    if setting.device.type == 'cuda':
        return peak_mb_on_cuda(step)
    return peak_mb_on_cpu(
        subject, setting.batch_size, setting.shape, setting.dtype, setting.train, setting.threads
    )
