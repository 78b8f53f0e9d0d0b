"""Measures one case."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from benchmarking.memory import peak_on_cuda
from benchmarking.step import Setting, make_images, make_step
from benchmarking.targets import dense_target

from mmtoken.analysis.host_reads import count_host_reads
from mmtoken.analysis.spread import spread
from mmtoken.analysis.timing import ratios, time_in_turn

from .cases import Case
from .costs import compare_costs
from .kernels import KERNELS
from .networks import NETWORKS, QUICK

WARM_UP_CALLS = 5
CPU, FULL = torch.device('cpu'), torch.float32
PARITY_LIMITS = dict(float32=1e-3, bfloat16=0.1)  # of relative errors
PARITY_SHAPE = (256, 384)  # on which a CPU is fast enough


@dataclass(frozen=True)
class Bench:
    """Where and how thoroughly cases are measured.

    Attributes:
        device: CPU or CUDA device.
        quick: Small images.
        rounds: How often each network is timed.
    """

    device: torch.device
    quick: bool = False
    rounds: int = 5

    def measure(self, case: Case) -> dict:
        """Measure a case; the keys of the results depend on its kind.

        Raises:
            Exception: Whatever the network raises, out of memory for example.
        """
        if case.kind in KERNELS:
            return self._kernel(case)
        return self._parity(case) if case.kind == 'parity' else self._speed(case)

    def shape(self, case: Case) -> tuple[int, int]:
        """Height and width of the images of a case."""
        if self.quick:
            return QUICK
        return PARITY_SHAPE if case.kind == 'parity' else NETWORKS[case.name].shape

    def _setting(self, case: Case) -> Setting:
        return Setting(
            self.shape(case),
            case.batch_size,
            self.device,
            getattr(torch, case.dtype),
            train=case.kind == 'training',
            compiled=case.kind == 'compiled',
            captured=case.kind == 'captured',
        )

    def _speed(self, case: Case) -> dict:
        """Times of a network, its twin, and its twin on smaller images."""
        setting = self._setting(case)
        sparse = NETWORKS[case.name].target(case.size)
        runs = dict(sparse=(sparse, setting), twin=(dense_target(sparse), setting))
        costs = compare_costs(case.name, case.size, setting.shape, self.device)
        # Torch would compile the twin for several shapes at once, which is slower than for one.
        if 'lower' in costs and case.kind != 'compiled':
            smaller = replace(setting, shape=tuple(costs['lower']['shape']))
            runs['lower'] = dense_target(sparse), smaller
        steps = {
            name: make_step(target, target.build().to(self.device), its)
            for name, (target, its) in runs.items()
        }
        times = self._time(steps)
        results = dict(
            ms={name: spread(t)['median'] for name, t in times.items()},
            speedup=spread(ratios(times['twin'], times['sparse']))['median'],
            mac_ratio=costs['twin']['macs'] / costs['sparse']['macs'],
            costs=costs,
            round_ms=times,
        )
        results['realised'] = results['speedup'] / results['mac_ratio']
        if self.device.type == 'cuda' and case.kind != 'captured':  # whose memory is set aside
            results['peak_mb'] = {name: peak_on_cuda(step) for name, step in steps.items()}
        if case.kind == 'forward':
            results['host_reads'] = dict(count_host_reads(steps['sparse'], self.device))
        return results

    def _parity(self, case: Case) -> dict:
        """Difference to the maps of the same network on the CPU in float32.

        Raises:
            ValueError: It is too large for rounding, in a network that computes the same there.
        """
        setting = self._setting(case)
        target = NETWORKS[case.name].target(case.size)
        network = target.build()
        with torch.inference_mode():
            with target.override():
                expected = network(make_images(target, replace(setting, device=CPU, dtype=FULL)))
            network.to(setting.device, setting.dtype)
            with target.override():
                maps = network(make_images(target, setting))
        pairs = zip(maps, expected, strict=True)
        error = max(relative_error(map_, wanted) for map_, wanted in pairs)
        limit = PARITY_LIMITS[case.dtype]
        if error > limit and not NETWORKS[case.name].compares:
            raise ValueError(f'maps differ by {error:.1e} from those of the CPU, above {limit:.0e}')
        return dict(error=error)

    def _kernel(self, case: Case) -> dict:
        """Time of a form, and its difference to the first one."""
        forms = KERNELS[case.kind]
        first = next(iter(forms.values()))
        setting = case.size, case.batch_size, self.device, getattr(torch, case.dtype)
        step, reference = (form.prepare(*setting) for form in (forms[case.name], first))
        step = torch.no_grad()(step)
        results = dict(error=relative_error(step(), torch.no_grad()(reference)()))
        (times,) = self._time(dict(form=step)).values()
        results |= dict(ms=dict(sparse=spread(times)['median']), round_ms=dict(sparse=times))
        if self.device.type == 'cuda':
            results['peak_mb'] = dict(sparse=peak_on_cuda(step))
        return results

    def _time(self, steps: Mapping[str, Callable[[], object]]) -> dict[str, list[float]]:
        for step in steps.values():
            for _ in range(WARM_UP_CALLS if self.device.type == 'cuda' else 1):
                step()
        return time_in_turn(steps, self.rounds, self.device)


def relative_error(given: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over that of what is expected."""
    given, expected = given.double().cpu(), expected.double().cpu()
    return ((given - expected).norm() / expected.norm()).item()
