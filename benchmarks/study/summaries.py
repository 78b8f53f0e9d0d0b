"""Results of the study, gathered for tables and plots."""

import json
from collections.abc import Collection
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import mean

from rows import RESULTS, read_rows

# The scores that a task is judged by, as MMEngine names them, and their names in tables
SCORES = {
    'mIoU': 'mIoU',
    'boundary/mIoU': 'boundary mIoU',
    'coco/bbox_mAP': 'box AP',
    'coco/segm_mAP': 'mask AP',
}


@dataclass(frozen=True)
class Summary:
    """A row with all of its seeds.

    Attributes:
        name: Of the row.
        seeds: Those that have been run.
        scores: Name of a score to its values, in points, one a seed.
        query_ratio: Tokens over those of the dense network: mean over photographs and standard
            deviation; None for networks that do not choose.
        cost: What measure.py found, or None.
        weights: File that training started from; None from scratch.
    """

    name: str
    seeds: list[int]
    scores: dict[str, list[float]]
    query_ratio: tuple[float, float] | None
    cost: dict | None
    weights: str | None


def summarize(task: str) -> list[Summary]:
    """The rows of a task that have results, in the order of its file."""
    file = RESULTS / task / 'cost.json'
    costs = json.loads(file.read_text())['rows'] if file.exists() else {}
    summaries = []
    for name in read_rows(task):
        runs = [
            json.loads(p.read_text()) for p in sorted(RESULTS.glob(f'{task}/{name}_seed*.json'))
        ]
        if not runs:
            continue
        for run in runs:
            assert run['row'] == name, run['row']
        ratios = [run['query_ratio'] for run in runs if run['query_ratio']]
        ratio = (
            (mean(r['mean'] for r in ratios), mean(r['std'] for r in ratios)) if ratios else None
        )
        scores = {
            label: [points(key, run['scores'][key]) for run in runs]
            for key, label in SCORES.items()
            if all(key in run['scores'] for run in runs)
        }
        summaries.append(
            Summary(
                name,
                [run['seed'] for run in runs],
                scores,
                ratio,
                costs.get(name),
                runs[0]['weights'],
            )
        )
    return summaries


def with_seeds(summary: Summary, seeds: list[int]) -> Summary:
    """A row with some of its seeds."""
    places = [summary.seeds.index(seed) for seed in seeds]
    scores = {name: [values[i] for i in places] for name, values in summary.scores.items()}
    return replace(summary, seeds=seeds, scores=scores)


def with_shared_seeds(
    summaries: list[Summary], seeds: Collection[int] | None = None
) -> list[Summary]:
    """Rows with ``seeds``, or with the seeds that all have: a seed changes every row.

    Without ``seeds``, rows that lack the lowest seed of all are left out.
    """
    if not summaries:
        return []
    if not seeds:
        lowest = min(min(s.seeds) for s in summaries)
        summaries = [s for s in summaries if lowest in s.seeds]
        seeds = set.intersection(*(set(s.seeds) for s in summaries))
    return [with_seeds(s, sorted(seeds)) for s in summaries]


def twin_of(summary: Summary, summaries: list[Summary]) -> Summary | None:
    """The dense twin of a row ``NAME`` or ``NAME_VARIANT``: ``NAME_dense``, or else ``dense``.

    None for dense networks, and without such a row.
    """
    if has_all_tokens(summary.name):
        return None
    rows = {s.name: s for s in summaries}
    words = summary.name.split('_')
    twins = ('_'.join([*words[:n], 'dense']) for n in range(len(words), -1, -1))
    return next((rows[twin] for twin in twins if twin in rows), None)


def above_twin_by_seed(summary: Summary, summaries: list[Summary], score: str) -> list[float]:
    """Points above the dense twin, with each seed that both have."""
    twin = twin_of(summary, summaries)
    if twin is None:
        return []
    return [
        with_seeds(summary, [seed]).scores[score][0] - with_seeds(twin, [seed]).scores[score][0]
        for seed in summary.seeds
        if seed in twin.seeds
    ]


def above_line_by_seed(summary: Summary, summaries: list[Summary], score: str) -> list[float]:
    """Points above the line with each seed, through resolutions that have all seeds of the row."""
    line = [s for s in summaries if is_dense(s.name) and set(summary.seeds) <= set(s.seeds)]
    found = [
        above_line(with_seeds(summary, [seed]), [with_seeds(s, [seed]) for s in line], score)
        for seed in summary.seeds
    ]
    return [] if None in found else found


def points(key: str, value: float) -> float:
    """A score from 0 to 100; COCO's are from 0 to 1."""
    return 100 * value if key.startswith('coco/') else value


def has_all_tokens(name: str) -> bool:
    """Whether a row is a dense network: the one of the task, or the twin of another row."""
    return 'dense' in name.split('_')


def is_dense(name: str) -> bool:
    """Whether a row is the dense network, at whatever resolution."""
    return name.split('_')[0] == 'dense'


def above_line(summary: Summary, summaries: list[Summary], score: str) -> float | None:
    """Points above the dense network at a resolution that costs as many milliseconds.

    The dense network's scores are joined by straight lines. None for the dense network itself,
    without times, and beyond the largest or the smallest resolution.
    """
    line = sorted(
        (s.cost['ms']['median'], mean(s.scores[score]))
        for s in summaries
        if is_dense(s.name) and s.cost
    )
    if is_dense(summary.name) or not summary.cost:
        return None
    ms = summary.cost['ms']['median']
    for (left, low), (right, high) in pairwise(line):
        if left <= ms <= right:
            expected = low + (high - low) * (ms - left) / (right - left)
            return mean(summary.scores[score]) - expected
    return None
