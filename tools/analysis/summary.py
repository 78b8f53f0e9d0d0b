"""Medians over several runs of benchmark.py."""

import argparse
import json
import re
import sys
from pathlib import Path
from statistics import median

from cli import HelpFormatter, fail, figure, routing_words
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
FIELDS = (
    'sparse_ms', 'dense_ms', 'speedup', 'speedup_vs_peer', 'peak_mb_sparse', 'peak_mb_dense',
)  # fmt: skip
# Runs that agree in these, and in their ratios, are repetitions of each other.
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
    parser.add_argument('--markdown', action='store_true', help='print the table in Markdown')
    args = parser.parse_args()
    runs: dict[str, list[dict]] = {}
    for path in args.files:
        try:
            run = json.loads(path.read_text())
            key = json.dumps([*(run[field] for field in SETTING), routing_of(run)])
        except (OSError, ValueError, KeyError) as error:
            return fail(f'{path} is no result of benchmark.py ({type(error).__name__}: {error})')
        runs.setdefault(key, []).append(run)
    table = make_table(list(runs.values()))
    if args.markdown:
        print(to_markdown(table))
    else:
        Console().print(table)
    return 0


def make_table(groups: list[list[dict]]) -> Table:
    """One row for each group of repetitions."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column('network, images', overflow='fold')
    for column in ('ms (twin)', 'speed-up', 'MAC ratio', 'vs. library', 'MB (twin)', 'runs'):
        table.add_column(column, justify='right')
    for group in groups:
        values = {field: middle(group, field) for field in FIELDS}
        ms, twin_ms, speedup, over_peer, mb, twin_mb = values.values()
        table.add_row(
            describe(group[0]),
            f'{figure(ms)} ({figure(twin_ms)})',
            f'{speedup:.2f}',
            f'{group[0]["mac_ratio"]:.2f} ({group[0]["executed_ratio"]:.2f})',
            '' if over_peer is None else f'{over_peer:.2f}',
            '' if mb is None else f'{mb:.0f} ({twin_mb:.0f})',
            str(len(group)),
        )
    return table


def to_markdown(table: Table) -> str:
    """The same table for a page."""
    columns = [[column.header, column.justify, *column.cells] for column in table.columns]
    header, justify, *rows = zip(*columns, strict=True)
    rule = ['---:' if side == 'right' else '---' for side in justify]
    return '\n'.join(f'| {" | ".join(cells)} |' for cells in (header, rule, *rows))


def middle(group: list[dict], field: str) -> float | None:
    """Median of a figure over repetitions; None where it was not measured."""
    values = [run[field] for run in group if run[field] is not None]
    return median(values) if values else None


def routing_of(run: dict) -> dict:
    """The ratios that token layouts were drawn with, by name."""
    names = [name for name in run if f'{name}_measured' in run]
    return {name: run[name] for name in names if run[name] is not None}


def describe(run: dict) -> str:
    """What was run, in short."""
    height, width = run['shape']
    head, *others = Path(run['config']).stem.split('_')
    if not others or re.match(r'\d+xb\d+', others[0]):  # a classifier: name_16xb64_in1k
        words = [head]
    else:
        words = [f'{head}_{others[0]}' if run['part'] == 'model' else others[0]]
    words += [f'{run["batch_size"]}x{height}x{width}'] + ['training'] * run['train']
    words += ['compiled'] * run['compile']
    if run['device'] == 'cpu' and run['threads'] > 1:
        words.append(f'{run["threads"]} threads')
    words += routing_words(routing_of(run))
    if run['device'] != 'cpu' or run['dtype'] != 'float32':
        words += [run['device'], run['dtype']]
    return ', '.join(words)


if __name__ == '__main__':
    sys.exit(main())
