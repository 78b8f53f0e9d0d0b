"""Speed-ups on several machines."""

import json
import re
from statistics import median

from .common import BENCHMARKS, markdown, read


def machines() -> str:
    """Speed-ups on all machines."""
    others, rows, ours = other_machines(), [], set()
    for network, dtype in dict.fromkeys(key for found in others.values() for key in found):
        runs = read(BENCHMARKS, f'{network}_run*').values()
        ours |= {run['environment']['device'] for run in runs}
        here = [run['speedup'] for run in runs if run['dtype'] == dtype]
        there = [found.get((network, dtype)) for found in others.values()]
        cells = ['–' if value is None else f'{value:.2f}'
                 for value in (median(here) if here else None, *there)]  # fmt: skip
        executed = median(run['executed_ratio'] for run in runs)
        name = network.replace('_forward_', ', ').replace('_train_', ', training, ')
        rows.append((name, dtype, f'{executed:.2f}', *cells))
    (cpu,) = ours
    return markdown(('backbone, image', 'precision', 'executed MAC ratio', cpu, *others), rows)


def other_machines() -> dict[str, dict[tuple[str, str], float]]:
    """Speed-ups by processor, then by network and data type; the last were measured by others."""
    measured: dict[str, dict[tuple[str, str], list[float]]] = {}
    for name, run in read(BENCHMARKS / 'machines', '*').items():
        found = measured.setdefault(run['environment']['device'], {})
        network = re.sub(r'_[a-z0-9]+_run\d+$', '', name)
        found.setdefault((network, run['dtype']), []).append(run['speedup'])
    medians = {
        cpu: {key: median(values) for key, values in found.items()}
        for cpu, found in measured.items()
    }
    reported = json.loads((BENCHMARKS / 'reported' / 'xeon_amx.json').read_text())
    theirs = {(run['network'], run['dtype']): run['speedup'] for run in reported['runs']}
    return {**medians, reported['cpu']: theirs}
