"""Results of the study in benchmarks/study."""

import json
import sys
from importlib import import_module
from pathlib import Path
from statistics import mean
from types import ModuleType

from mmtoken.analysis.spread import spread

from .common import BENCHMARKS, markdown, plus_minus, signed


def study(task: str) -> str:
    """Accuracy and cost of the rows of a task, beside the dense network at lower resolutions."""
    module = study_module('summaries')
    summaries = module.with_shared_seeds(module.summarize(task))
    names, rows = list(summaries[0].scores), []
    for summary in summaries:
        above = (module.above_line(summary, summaries, name) for name in names)
        ratio = summary.query_ratio
        rows.append(
            (f'`{summary.name}`', *(plus_minus(spread(v)) for v in summary.scores.values()),
             ' / '.join('–' if points is None else signed(points, 1) for points in above),
             *costs(summary.cost),
             '–' if ratio is None else f'{ratio[0]:.2f} ± {ratio[1]:.2f}')
        )  # fmt: skip
    header = ('row', *names, 'above the line', 'ms', 'G MACs', 'MiB', 'tokens')
    return markdown(header, rows)


def means(task: str) -> str:
    """Means over trainings of the rows that have a title, best first, with their times.

    Raises:
        ValueError: No row has both a title and results.
    """
    rows, module = study_module('rows').read_rows(task), study_module('summaries')
    titled = [s for s in module.summarize(task) if rows[s.name].title]
    if not titled:
        raise ValueError(f'no row of {task}.yml has both a title and results')
    shared = module.with_shared_seeds(titled)
    shared.sort(key=lambda s: -mean(next(iter(s.scores.values()))))
    cells = [
        (rows[s.name].title, *(plus_minus(spread(v), decimals=1) for v in s.scores.values()),
         '–' if s.cost is None else f'{s.cost["ms"]["median"] / 1000:.2f}')
        for s in shared
    ]  # fmt: skip
    header = (f'mean of {len(shared[0].seeds)} trainings', *shared[0].scores, 'seconds')
    return markdown(header, cells)


def seeds(task: str) -> str:
    """Scores of the rows that were trained with several seeds, seed by seed."""
    module = study_module('summaries')
    summaries = module.summarize(task)
    several = [s for s in summaries if len(s.seeds) > 1]
    columns = sorted({seed for summary in several for seed in summary.seeds})
    rows = []
    for summary in several:
        by_seed = dict(zip(summary.seeds, zip(*summary.scores.values(), strict=True), strict=True))
        cells = (' / '.join(f'{v:.2f}' for v in by_seed.get(seed, ())) for seed in columns)
        rows.append((f'`{summary.name}`', *(cell or '–' for cell in cells)))
    header = ['row', *(f'seed {seed}' for seed in columns)]
    comparisons = {
        'above the twin': module.above_twin_by_seed,
        'above the line': module.above_line_by_seed,
    }
    for title, compare in comparisons.items():
        cells = []
        for summary in several:
            found = [compare(summary, summaries, name) for name in summary.scores]
            cells.append(' / '.join(plus_minus(spread(v), sign=True) for v in found if v))
        if any(cells):
            header.append(title)
            rows = [(*row, cell or '–') for row, cell in zip(rows, cells, strict=True)]
    return markdown(header, rows)


def costs(cost: dict | None) -> tuple[str, str, str]:
    """Milliseconds, billions of multiply-accumulates and MiB of a row of the study."""
    if cost is None:
        return '–', '–', '–'
    gmacs = cost['gmacs']['mean']
    return (
        f'{cost["ms"]["median"]:.0f}', f'{gmacs:.{1 if gmacs >= 10 else 2}f}',
        f'{cost["peak_mb"]:.0f}',
    )  # fmt: skip


def batches(task: str) -> str:
    """Speed-up over the dense network and spread over photographs, by the size of a batch."""
    files = (BENCHMARKS / 'study' / 'results' / task).glob('cost*.json')
    sizes = sorted((json.loads(file.read_text()) for file in files), key=lambda c: c['batch_size'])
    rows = []
    for name in sizes[-1]['rows']:  # not all rows are measured in batches
        cells = []
        for found in sizes:
            row, dense = (found['rows'][key]['ms']['median'] for key in (name, 'dense'))
            deviation = found['rows'][name]['ms_by_batch']['std']
            over = '' if deviation is None else f' ± {deviation / row:.1%}'
            cells.append(f'{dense / row:.2f}×{over}')
        rows.append((f'`{name}`', *cells))
    return markdown(('row', *(f'batch of {found["batch_size"]}' for found in sizes)), rows)


def gates(task: str) -> str:
    """How well gates find the regions whose labels change."""
    results = json.loads((BENCHMARKS / 'study' / 'results' / task / 'gates.json').read_text())
    rows = [
        (setting['name'], f'{setting["coverage"]:.3f}', f'{setting["coverage_of_all"]:.3f}')
        for setting in results['settings']
    ]
    return markdown(('gate', 'of each photograph', 'of all photographs'), rows)


def budgets(task_and_row: str) -> str:
    """Scores and times of one checkpoint at several budgets."""
    task, row = task_and_row.split('/')
    file = BENCHMARKS / 'study' / 'results' / task / f'budgets_{row}.json'
    module, found = study_module('summaries'), json.loads(file.read_text())['budgets']
    labels = {k: v for k, v in module.SCORES.items() if k in next(iter(found.values()))['scores']}
    rows = [
        (f'{float(tokens):.2f}', *(f'{module.points(k, b["scores"][k]):.2f}' for k in labels),
         f'{b["ms"]["median"]:.0f}', f'{b["gmacs"]:.1f}')
        for tokens, b in found.items()
    ]  # fmt: skip
    return markdown(('tokens', *labels.values(), 'ms', 'G MACs'), rows)


def zoo() -> str:
    """Trained configs: those that are rows of the study without changes."""
    study_rows, module, rows = study_module('rows'), study_module('summaries'), []
    for task in study_rows.tasks():
        known = study_rows.read_rows(task)
        for summary in module.summarize(task):
            row = known[summary.name]
            if row.options or row.size or row.override:
                continue
            scores = (f'{k} {plus_minus(spread(v))}' for k, v in summary.scores.items())
            rows.append(
                (f'[`{Path(row.config).stem}`](../{row.config})', summary.weights or 'none',
                 ', '.join(scores), ' '.join(map(str, summary.seeds)), *costs(summary.cost),
                 f'`python benchmarks/study/run.py {task} {summary.name} --seed N`')
            )  # fmt: skip
    header = ('config', 'weights', 'scores', 'seeds', 'ms', 'G MACs', 'MiB', 'command')
    return markdown(header, rows)


def study_module(name: str) -> ModuleType:
    """A module of ``benchmarks/study``, which is no package."""
    folder = str(BENCHMARKS / 'study')
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return import_module(name)
