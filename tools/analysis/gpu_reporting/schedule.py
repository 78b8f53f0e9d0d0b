"""Runs cases one after another, for as long as there is time."""

import gc
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

from .cases import Case

FIRST_GUESS = dict(compiled=90.0)  # seconds that a case takes when none of its kind has been run


@dataclass
class Schedule:
    """Measures cases until a time is over.

    Attributes:
        seconds: For all cases together.
        measure: Measures a case; it may raise.
        on_result: Called with each case and its results, or with ``{'failed': 'the error'}``.
        clock: Seconds since any time.
        left_out: Cases for which time was too short, after :meth:`run`.
    """

    seconds: float
    measure: Callable[[Case], dict]
    on_result: Callable[[Case, dict], object]
    clock: Callable[[], float] = time.monotonic
    left_out: list[Case] = field(default_factory=list)

    def run(self, cases: Iterable[Case]) -> None:
        """Measure cases in order.

        A case is left out if less time is left than the dearest one of its kind took; cheaper ones
        behind it are still measured. One that fails is recorded, and the next one follows.
        """
        end, dearest, waiting = self.clock() + self.seconds, {}, list(cases)
        while waiting:
            case, started = waiting.pop(0), self.clock()
            if end - started <= dearest.get(case.kind, FIRST_GUESS.get(case.kind, 0)):
                self.left_out.append(case)
                continue
            self.on_result(case, self._measure(case))
            try:
                release_memory()
            except RuntimeError:  # after an illegal access a process can use its GPU no more
                self.left_out += waiting
                return
            dearest[case.kind] = max(dearest.get(case.kind, 0), self.clock() - started)

    def _measure(self, case: Case) -> dict:
        try:
            return self.measure(case)
        except Exception as error:  # out of memory, a compiler's, a kernel's
            return dict(failed=' '.join(f'{type(error).__name__}: {error}'.split())[:300])


def release_memory() -> None:
    """Give the next case what the last one held: networks, compiled code, cached blocks."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
