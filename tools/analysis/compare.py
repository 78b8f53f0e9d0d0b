"""Train pairs of configs with several seeds and compare their scores."""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from cli import HelpFormatter, fail, positive, write_json
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

DESCRIPTION = """\
Train a config and its dense twin once per seed and print the difference of their scores.

A seed gives both networks of a pair the same order of images, flips and crops, so differences are
taken seed by seed. Printed are their mean and standard deviation over seeds (n - 1). Scores are
those of the last evaluation, from 0 to 100.

Runs go to DIR/CONFIG/seedN, with the output in output.log. Finished runs are not repeated;
interrupted ones start again. To repeat a run after a change of its config, delete its folder.
"""
EXAMPLES = """\
examples:
  mmtoken compare --pair CFG TWIN --work-dir work_dirs/seeds
  mmtoken compare --pair CFG TWIN --pair CFG2 TWIN2 --seeds 0 1 2 --jobs 2 \\
      --work-dir work_dirs/seeds --json differences.json
"""
TRAINER = Path(__file__).resolve().parent.parent / 'train.py'
RESULT = 'result.json'
POLL_SECONDS = 0.5


class Run(NamedTuple):
    """One training."""

    config: Path
    seed: int
    folder: Path

    @property
    def name(self) -> str:
        return f'{self.config.stem}, seed {self.seed}'

    def result(self) -> dict[str, float] | None:
        """Scores, 0 to 100; None if it has not finished."""
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
    pairs = [compare(*pair, runs) for pair in args.pair]
    report(pairs)
    write_json(args.json, dict(seeds=args.seeds, pairs=pairs))
    for run in failed:
        fail(f'{run.name} failed; see {run.folder / "output.log"}')
    return 1 if failed else 0


def parse_args():
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EXAMPLES, formatter_class=HelpFormatter
    )
    parser.add_argument(
        '--pair', nargs=2, type=Path, action='append', required=True, metavar=('CFG', 'TWIN'),
        help='a config and the config of its dense twin; can be repeated',
    )  # fmt: skip
    parser.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2], metavar='N')
    parser.add_argument('--work-dir', type=Path, required=True, metavar='DIR', help='for all runs')
    parser.add_argument(
        '--jobs', type=positive, default=1, metavar='N',
        help='trainings at a time; they share the CPU cores evenly',
    )  # fmt: skip
    parser.add_argument(
        '--cfg-options', nargs='+', default=[], metavar='KEY=VALUE', help='for every training'
    )
    parser.add_argument('--json', type=Path, metavar='FILE', help='write the results here as well')
    return parser.parse_args()


def list_runs(pairs: list[list[Path]], seeds: list[int], work_dir: Path) -> list[Run]:
    """All trainings, ordered by seed; a config of several pairs runs once."""
    configs = dict.fromkeys(path for pair in pairs for path in pair)
    return [Run(c, seed, work_dir / c.stem / f'seed{seed}') for seed in seeds for c in configs]


def train_all(waiting: list[Run], jobs: int, options: list[str]) -> list[Run]:
    """Run trainings, ``jobs`` at a time; return those that failed."""
    from mmtoken.analysis.training_log import describe_progress, last_scores

    columns = (
        TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
    )  # fmt: skip
    running: dict[Run, tuple[subprocess.Popen, int]] = {}
    failed, waiting = [], list(waiting)
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        total = progress.add_task('trainings', total=len(waiting))
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    run = waiting.pop(0)
                    running[run] = start(run, jobs, options), progress.add_task('', total=None)
                time.sleep(POLL_SECONDS)
                for run, (process, task) in list(running.items()):
                    text = f'{run.name}: {describe_progress(run.folder)}'
                    progress.update(task, description=text)
                    if process.poll() is None:
                        continue
                    del running[run]
                    progress.remove_task(task)
                    progress.advance(total)
                    scores = last_scores(run.folder) if process.returncode == 0 else {}
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
    """Start a training."""
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


def compare(config: Path, twin: Path, runs: list[Run]) -> dict:
    """Scores of a pair and their differences, over the seeds that both have finished."""
    from mmtoken.analysis.spread import spread

    sides = [{run.seed: run.result() for run in runs if run.config == c} for c in (config, twin)]
    seeds = [seed for seed in sides[0] if sides[0][seed] and sides[1][seed]]
    sparse, dense = ([side[seed] for seed in seeds] for side in sides)
    metrics = {}
    for name in sparse[0] if seeds else ():
        a, b = ([scores[name] for scores in side] for side in (sparse, dense))
        samples = dict(sparse=a, dense=b, difference=[x - y for x, y in zip(a, b, strict=True)])
        metrics[name] = {k: spread(values) | dict(values=values) for k, values in samples.items()}
    return dict(config=config.name, twin=twin.name, seeds=seeds, metrics=metrics)


def report(pairs: list[dict]) -> None:
    """Print the table."""
    table = Table(title='Scores, mean ± std over seeds', box=SIMPLE_HEAD, pad_edge=False)
    table.add_column('config', overflow='fold')
    table.add_column('metric')
    for column in ('sparse', 'dense twin', 'difference', 'seeds'):
        table.add_column(column, justify='right', no_wrap=True)
    for pair in pairs:
        config = pair['config'].removesuffix('.py')
        for i, (name, sides) in enumerate(pair['metrics'].items()):
            cells = (_cell(sides['sparse']), _cell(sides['dense']), _cell(sides['difference'], '+'))
            table.add_row('' if i else config, short_name(name), *cells, str(len(pair['seeds'])))
        if not pair['metrics']:
            table.add_row(config, 'no seed has finished on both sides')
    Console().print(table)


def _cell(values: dict, sign: str = '') -> str:
    text = f'{values["mean"]:{sign}.2f}'
    return text if values['std'] is None else f'{text} ± {values["std"]:.2f}'


def describe(scores: dict[str, float]) -> str:
    """``'bbox_mAP 31.20, segm_mAP 28.10'``."""
    return ', '.join(f'{short_name(name)} {score:.2f}' for name, score in scores.items())


def short_name(metric: str) -> str:
    """``'bbox_mAP'`` of ``'coco/bbox_mAP'``."""
    return metric.rpartition('/')[2]


if __name__ == '__main__':
    sys.exit(main())
