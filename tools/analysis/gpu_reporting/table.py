"""The results as a table."""

from collections.abc import Iterable

from cli import figure
from rich.box import SIMPLE_HEAD
from rich.table import Table

from .cases import Case

WIDTH = 120  # in characters, where all columns are shown in full
COLUMNS = (
    'ms', 'twin', 'lower', 'speed-up', 'MAC ratio', 'realised', 'MiB', 'waits', 'error',
)  # fmt: skip


def make_table(cases: Iterable[Case], results: dict[str, dict]) -> Table:
    """A row for each case that has results; cells that were not measured are empty.

    Args:
        cases: In the order of rows.
        results: By the text of a case.
    """
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for column in ('network', 'setting'):
        table.add_column(column, no_wrap=True)
    for column in COLUMNS:
        table.add_column(column, justify='right', no_wrap=True)
    for case in cases:
        if str(case) in results:
            setting = f'{case.kind}, {case.setting}'
            table.add_row(f'{case.name} {case.size}', setting, *_cells(results[str(case)]))
    return table


def _cells(result: dict) -> list[str]:
    if 'failed' in result:
        return ['failed', *[''] * (len(COLUMNS) - 1)]
    ms, peak = result.get('ms', {}), result.get('peak_mb', {})
    reads = result.get('host_reads')
    return [
        *(figure(ms[name]) if name in ms else '' for name in ('sparse', 'twin', 'lower')),
        *(_ratio(result.get(name)) for name in ('speedup', 'mac_ratio', 'realised')),
        f'{peak["sparse"]:.0f}' if peak else '',
        '' if reads is None else str(sum(reads.values())),
        f'{result["error"]:.0e}' if 'error' in result else '',
    ]


def _ratio(number: float | None) -> str:
    return '' if number is None else f'{number:.2f}'
