"""Time, multiply-accumulates and memory of networks and of their dense twins."""

import subprocess
import sys

from .common import BENCHMARKS, ROOT, markdown, read


def speed(glob: str = '*') -> str:
    """Medians over runs of benchmark.py."""
    files = sorted(BENCHMARKS.glob(f'{glob}.json'))
    command = [sys.executable, ROOT / 'tools' / 'analysis' / 'summary.py', '--markdown', *files]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def profiles() -> str:
    """Milliseconds by kind of work, of networks and of their dense twins."""
    kinds, rows = [], []
    for name, run in read(BENCHMARKS / 'profiles', '*').items():
        sparse, dense = (run['profile_ms'][network] for network in ('sparse', 'dense'))
        kinds = list(sparse)
        pairs = [(sparse[kind], dense[kind]) for kind in kinds]
        pairs.append((sum(sparse.values()), sum(dense.values())))
        rows.append((name.replace('_', ', '), *(f'{a:.0f} / {b:.0f}' for a, b in pairs)))
    return markdown(('backbone, image, precision', *kinds, 'sum'), rows)


def parts() -> str:
    """Milliseconds by part of the model, of models and of the same with the dense twins."""
    rows = []
    for name, run in read(BENCHMARKS / 'parts', '*').items():
        sparse, dense = (by_part(run['parts_ms'][network]) for network in ('sparse', 'dense'))
        cells = (f'{a:.0f} / {b:.0f}' for a, b in zip(sparse, dense, strict=True))
        share = f'{dense[0] / sum(dense):.0%}'
        rows.append((name.replace('_', ', '), *cells, share, f'{run["speedup"]:.2f}×'))
    header = ('backbone', 'neck', 'heads', 'rest', "share of the twin's backbone", 'speed-up')
    return markdown(('model, backbone, image', *header), rows)


def by_part(times: dict[str, float]) -> tuple[float, float, float, float]:
    """Milliseconds of backbone, neck, heads and the rest."""
    heads = sum(ms for part, ms in times.items() if part not in ('backbone', 'neck', 'rest'))
    return times['backbone'], times.get('neck', 0), heads, times['rest']


def compiled() -> str:
    """Milliseconds with and without torch.compile, of networks and of their dense twins."""
    rows = []
    for name, eager in read(BENCHMARKS / 'compiled', '*_eager').items():
        name = name.removesuffix('_eager')
        (run,) = read(BENCHMARKS / 'compiled', f'{name}_compiled').values()
        cells = (
            cell
            for r in (eager, run)
            for cell in (f'{r["sparse_ms"]:.0f} / {r["dense_ms"]:.0f}', f'{r["speedup"]:.2f}×')
        )
        rows.append((name.replace('_', ', '), *cells))
    header = ('eager, ms', 'speed-up', 'compiled, ms', 'speed-up')
    return markdown(('backbone, image', *header), rows)


def macs(glob: str = '*') -> str:
    """What flops.py counted at 800 x 1280."""
    rows = []
    for name, run in read(BENCHMARKS / 'macs', glob).items():
        assert run['shape'] == [800, 1280], name
        name += ratio_of(run)
        sparse, dense = run['sparse'], run['dense']
        rows.append(
            (name, f'{sparse["macs"] / 1e9:.1f}', f'{dense["macs"] / 1e9:.1f}',
             f'{run["mac_ratio"]:.2f}', f'{sparse["parameters"] / 1e6:.2f}')
        )  # fmt: skip
    return markdown(('backbone', 'G MACs', 'dense twin', 'ratio', 'M parameters'), rows)


def ratio_of(run: dict) -> str:
    """``', query ratio 0.436'`` of what flops.py counted at that ratio; empty without one."""
    for ratio in ('query_ratio', 'coarse_ratio'):
        if run.get(ratio) is not None:
            (value,) = run[ratio] if isinstance(run[ratio], list) else [run[ratio]]
            return f', {ratio.replace("_", " ")} {value}'
    return ''


def memory(glob: str = '*') -> str:
    """Multiply-accumulates and peak memory of backbones on large images, in brackets the twins'."""
    rows = []
    for name, run in read(BENCHMARKS / 'high_resolution', glob).items():
        sparse, dense = run['sparse'], run['dense']
        peaks = (
            f'{run["peak_mb"]["sparse"][step]:.0f} ({run["peak_mb"]["dense"][step]:.0f})'
            for step in ('forward pass', 'training step')
        )
        rows.append(
            (name.replace('_', ', ') + ratio_of(run),
             f'{sparse["macs"] / 1e9:.0f} ({dense["macs"] / 1e9:.0f})', f'{run["mac_ratio"]:.2f}',
             *peaks)
        )  # fmt: skip
    header = ('backbone, image', 'G MACs', 'ratio', 'MiB, forward pass', 'MiB, training step')
    return markdown(header, rows)
