"""Progress and scores of trainings and tests, from what MMEngine's Runner logs."""

import json
from pathlib import Path
from typing import NamedTuple


class Metric(NamedTuple):
    """A score of mmdet, mmseg or mmpretrain: its name in tables, and its factor to points."""

    label: str
    to_points: int


METRICS = {
    'coco/bbox_mAP': Metric('box AP', 100),
    'coco/segm_mAP': Metric('mask AP', 100),
    'mIoU': Metric('mIoU', 1),
    'accuracy/top1': Metric('top-1', 1),
}


def read_log(work_dir: Path) -> list[dict]:
    """Records of the latest run in a work directory, oldest first; empty if there is none."""
    # A training logs to vis_data/scalars.json, a test to TIME.json, both in a folder named TIME.
    patterns = ('*/vis_data/scalars.json', '*/[0-9]*_[0-9]*.json')
    logs = [path for pattern in patterns for path in work_dir.glob(pattern)]
    if not logs:
        return []
    latest = max(logs, key=lambda path: path.relative_to(work_dir).parts[0])
    # The last line of a training that runs may be incomplete.
    return [json.loads(line) for line in latest.read_text().splitlines() if line.endswith('}')]


def describe_progress(work_dir: Path) -> str:
    """How far the latest training in a work directory is, in words."""
    steps = [record for record in read_log(work_dir) if 'loss' in record]
    if not steps:
        return 'starting'
    return f'iteration {steps[-1]["iter"]}, loss {steps[-1]["loss"]:.3g}'


def last_scores(work_dir: Path) -> dict[str, float]:
    """Scores of the last evaluation of the latest run, 0 to 100; empty if there was none."""
    found: dict[str, float] = {}
    for record in read_log(work_dir):
        known = METRICS.keys() & record.keys()
        found |= {name: METRICS[name].to_points * record[name] for name in known}
    return {name: found[name] for name in METRICS if name in found}
