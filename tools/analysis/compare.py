"""Train configs and their dense twins with several seeds; means, spreads and differences."""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

from cli import HelpFormatter, fail, positive, write_json
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

DESCRIPTION = """\
Train a config and its dense twin once for each seed, and say how their scores differ.

A seed gives both networks of a pair the same order of images and the same flips and crops, so
differences are taken seed by seed: their mean, and their standard deviation over seeds (of a
sample, n - 1). Scores are in points, 0 to 100, of the last evaluation of a run.

Runs go to DIR/CONFIG/seedN, with what they print in output.log. A run that was finished there
before is not repeated; one that was interrupted starts again. Remove its folder to repeat a run
after a change of the config.
"""
EXAMPLES = """\
examples:
  python tools/analysis/compare.py --pair CFG TWIN --work-dir work_dirs/seeds
  python tools/analysis/compare.py --pair CFG TWIN --pair CFG2 TWIN2 --seeds 0 1 2 --jobs 2 \\
      --work-dir work_dirs/seeds --json differences.json
"""
TRAINER = Path(__file__).resolve().parent.parent / 'train.py'
METRICS = {'coco/bbox_mAP': 100, 'coco/segm_mAP': 100, 'mIoU': 1, 'accuracy/top1': 1}  # to points
RESULT = 'result.json'
FIELDS = {'step', 'epoch', 'iter'}
SECONDS_BETWEEN_LOOKS = 0.5


class Run(NamedTuple):
    """One training."""

    config: Path
    seed: int
    folder: Path

    @property
    def name(self) -> str:
        return f'{self.config.stem}, seed {self.seed}'

    def result(self) -> dict[str, float] | None:
        """Scores in points; None if it is not finished."""
        file = self.folder / RESULT
        return json.loads(file.read_text()) if file.exists() else None


def main() -> int:
    """Train what is missing, print a table; return 0, or 1 if a training failed."""
    args = parse_args()
    missing = [path for pair in args.pair for path in pair if not path.is_file()]
    if missing:
        return fail(f'no config file {missing[0]}')
    runs = list_runs(args.pair, args.seeds, args.work_dir)
    failed = train_all([run for run in runs if run.result() is None], args.jobs, args.cfg_options)
    results = dict(
        seeds=args.seeds,
        pairs=[compare(*pair, runs) for pair in args.pair],
    )
    report(results['pairs'])
    write_json(args.json, results)
    for run in failed:
        fail(f'{run.name} failed; see {run.folder / "output.log"}')
    return 1 if failed else 0


def parse_args():
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EXAMPLES, formatter_class=HelpFormatter
    )
    parser.add_argument(
        '--pair', nargs=2, type=Path, action='append', required=True, metavar=('CFG', 'TWIN'),
        help='a config and that of its dense twin; may be repeated',
    )  # fmt: skip
    parser.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2], metavar='N')
    parser.add_argument('--work-dir', type=Path, required=True, metavar='DIR', help='for all runs')
    parser.add_argument(
        '--jobs', type=positive, default=1, metavar='N',
        help='trainings at a time; the CPU cores are shared out among them',
    )  # fmt: skip
    parser.add_argument(
        '--cfg-options', nargs='+', default=[], metavar='KEY=VALUE', help='for every training'
    )
    parser.add_argument('--json', type=Path, metavar='FILE', help='write the figures here as well')
    return parser.parse_args()


def list_runs(pairs: list[list[Path]], seeds: list[int], work_dir: Path) -> list[Run]:
    """All trainings, those with the first seed first; a config of several pairs runs once."""
    configs = dict.fromkeys(path for pair in pairs for path in pair)
    return [Run(c, seed, work_dir / c.stem / f'seed{seed}') for seed in seeds for c in configs]


def train_all(waiting: list[Run], jobs: int, options: list[str]) -> list[Run]:
    """Run trainings, a few at a time; those that failed."""
    columns = (
        TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
    )  # fmt: skip
    running: dict[Run, tuple[subprocess.Popen, int]] = {}
    failed, waiting = [], list(waiting)
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        whole = progress.add_task('trainings', total=len(waiting))
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    run = waiting.pop(0)
                    running[run] = start(run, jobs, options), progress.add_task('', total=None)
                time.sleep(SECONDS_BETWEEN_LOOKS)
                for run, (process, task) in list(running.items()):
                    progress.update(task, description=f'{run.name}: {progress_of(run)}')
                    if process.poll() is None:
                        continue
                    del running[run]
                    progress.remove_task(task)
                    progress.advance(whole)
                    scores = read_scores(run.folder) if process.returncode == 0 else {}
                    if scores:
                        write_json(run.folder / RESULT, scores)
                        progress.console.print(f'{run.name}: {describe(scores)}')
                    else:
                        failed.append(run)
                        progress.console.print(f'{run.name}: failed')
        finally:
            for process, _ in running.values():
                process.terminate()
    return failed


def start(run: Run, jobs: int, options: list[str]) -> subprocess.Popen:
    """Begin a training."""
    run.folder.mkdir(parents=True, exist_ok=True)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    threads = str(max(1, (cores or 1) // jobs))
    command = [sys.executable, TRAINER, run.config, '--work-dir', run.folder]
    command += ['--cfg-options', f'randomness.seed={run.seed}', *options]
    with open(run.folder / 'output.log', 'w') as output:
        return subprocess.Popen(
            list(map(str, command)), stdout=output, stderr=subprocess.STDOUT,
            env=os.environ | dict(OMP_NUM_THREADS=threads, MKL_NUM_THREADS=threads),
        )  # fmt: skip


def records(folder: Path) -> list[dict]:
    """What the latest training in a folder logged: losses, then scores."""
    logs = sorted(folder.glob('*/vis_data/scalars.json'))  # folders are named by the time
    if not logs:
        return []
    lines = logs[-1].read_text().splitlines()
    return [json.loads(line) for line in lines if line.endswith('}')]


def progress_of(run: Run) -> str:
    """How far a training is, in words."""
    steps = [record['iter'] for record in records(run.folder) if 'iter' in record]
    return f'iteration {steps[-1]}' if steps else 'starting'


def read_scores(folder: Path) -> dict[str, float]:
    """Scores of the last evaluation, in points; empty if there was none."""
    scores: dict[str, float] = {}
    for record in records(folder):
        scores |= {name: scale * record[name] for name, scale in METRICS.items() if name in record}
    return scores


def compare(config: Path, twin: Path, runs: list[Run]) -> dict:
    """Scores of a pair, and their differences, over the seeds that both have finished."""
    sides = [{run.seed: run.result() for run in runs if run.config == c} for c in (config, twin)]
    seeds = [seed for seed in sides[0] if sides[0][seed] and sides[1][seed]]
    sparse, dense = ([side[seed] for seed in seeds] for side in sides)
    metrics = {}
    for name in sparse[0] if seeds else ():
        a, b = ([scores[name] for scores in side] for side in (sparse, dense))
        difference = [x - y for x, y in zip(a, b, strict=True)]
        metrics[name] = dict(sparse=spread(a), dense=spread(b), difference=spread(difference))
    return dict(config=config.name, twin=twin.name, seeds=seeds, metrics=metrics)


def spread(values: list[float]) -> dict:
    """Mean and standard deviation, None of a single value, and the values themselves."""
    return dict(mean=mean(values), std=stdev(values) if len(values) > 1 else None, values=values)


def report(pairs: list[dict]) -> None:
    """Print the table."""
    table = Table(title='Scores in points, mean ± std over seeds', box=SIMPLE_HEAD, pad_edge=False)
    table.add_column('config', overflow='fold')
    table.add_column('metric')
    for column in ('sparse', 'dense twin', 'difference', 'seeds'):
        table.add_column(column, justify='right', no_wrap=True)
    for pair in pairs:
        config = pair['config'].removesuffix('.py')
        for i, (name, sides) in enumerate(pair['metrics'].items()):
            table.add_row(
                '' if i else config, name.rpartition('/')[2],
                *(_cell(sides[side], sign) for side, sign in
                  (('sparse', ''), ('dense', ''), ('difference', '+'))),
                str(len(pair['seeds'])),
            )  # fmt: skip
        if not pair['metrics']:
            table.add_row(config, 'no seed has finished on both sides')
    Console().print(table)


def _cell(values: dict, sign: str) -> str:
    text = f'{values["mean"]:{sign}.2f}'
    return text if values['std'] is None else f'{text} ± {values["std"]:.2f}'


def describe(scores: dict[str, float]) -> str:
    """``'bbox_mAP 31.20, segm_mAP 28.10'``."""
    return ', '.join(f'{name.rpartition("/")[2]} {v:.2f}' for name, v in scores.items())


if __name__ == '__main__':
    sys.exit(main())
