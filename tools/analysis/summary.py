"""Medians over several runs of benchmark.py."""

import argparse
import json
import sys
from pathlib import Path
from statistics import median

from cli import HelpFormatter, fail, figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

DESCRIPTION = """\
Print a table of what runs of benchmark.py wrote with --json: one row for each setting, with the
median over its runs.
"""
EXAMPLES = """\
examples:
  python tools/analysis/summary.py benchmarks/*.json
"""
# What makes runs repetitions of each other
SETTING = (
    'config',
    'part',
    'shape',
    'batch_size',
    'device',
    'dtype',
    'threads',
    'train',
    'compile',
)


def main() -> int:
    """Print the table; return 0, or 1 if a file is not of benchmark.py."""
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EXAMPLES, formatter_class=HelpFormatter
    )
    parser.add_argument('files', nargs='+', type=Path, metavar='FILE', help='written with --json')
    runs: dict[str, list[dict]] = {}
    for path in parser.parse_args().files:
        try:
            run = json.loads(path.read_text())
            key = json.dumps([run[field] for field in SETTING])
        except (OSError, ValueError, KeyError) as error:
            return fail(f'{path} is no result of benchmark.py ({type(error).__name__}: {error})')
        runs.setdefault(key, []).append(run)
    Console().print(make_table(list(runs.values())))
    return 0


def make_table(groups: list[list[dict]]) -> Table:
    """One row for each group of repetitions."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column('network, step', overflow='fold')
    for column in (
        'ms',
        'twin ms',
        'speed-up',
        'MAC ratio',
        'vs. library',
        'MB',
        'twin MB',
        'runs',
    ):
        table.add_column(column, justify='right')
    for group in groups:

        def middle(field: str, group: list[dict] = group) -> float | None:
            values = [run[field] for run in group if run[field] is not None]
            return median(values) if values else None

        first = group[0]
        table.add_row(
            describe(first),
            *(figure(middle(field)) for field in ('sparse_ms', 'dense_ms')),
            f'{middle("speedup"):.2f}',
            f'{first["mac_ratio"]:.2f} ({first["executed_ratio"]:.2f})',
            *(
                '' if middle(field) is None else f'{middle(field):{form}}'
                for field, form in (
                    ('speedup_vs_peer', '.2f'),
                    ('peak_mb_sparse', '.0f'),
                    ('peak_mb_dense', '.0f'),
                )
            ),
            str(len(group)),
        )
    return table


def describe(run: dict) -> str:
    """What was run, in short."""
    height, width = run['shape']
    words = [run['config'].split('_')[1], f'{run["batch_size"]} x {height} x {width}']
    words += ['training'] * run['train'] + ['whole model'] * (run['part'] == 'model')
    words += ['compiled'] * run['compile']
    if run['device'] != 'cpu' or run['dtype'] != 'float32':
        words += [run['device'], run['dtype']]
    return ', '.join(words)


if __name__ == '__main__':
    sys.exit(main())
