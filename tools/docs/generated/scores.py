"""Scores of sparse networks beside those of their dense twins, on the embedded data set."""

from pathlib import Path

from mmtoken.analysis.training_log import METRICS

from .common import BENCHMARKS, markdown, plus_minus, read, signed


def scores(glob: str = '*') -> str:
    """Comparisons of compare.py."""
    rows = []
    for results in read(BENCHMARKS / 'shapes', glob).values():
        for pair in results['pairs']:
            for metric, spreads in pair['metrics'].items():
                sparse, dense, difference = (spreads[k] for k in ('sparse', 'dense', 'difference'))
                rows.append(
                    (f'`{Path(pair["config"]).stem}`', METRICS[metric].label, plus_minus(sparse),
                     plus_minus(dense), plus_minus(difference, sign=True), str(len(pair['seeds'])))
                )  # fmt: skip
    header = ('config', 'metric', 'score', 'of the other', 'difference', 'seeds')
    return markdown(header, rows)


def differences(results: dict) -> list[str]:
    """How far networks are from their dense twins, in points."""
    found = [
        f'{METRICS[metric].label} {signed(spreads["difference"]["mean"], 1)}'
        for pair in results['pairs']
        if '-dense_' in pair['twin']
        for metric, spreads in pair['metrics'].items()
    ]
    return [', '.join(found) + ' (one seed)' * (len(results['seeds']) == 1)]
