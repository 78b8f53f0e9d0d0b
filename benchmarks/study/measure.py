"""Measure trained rows of the study: time, multiply-accumulates and memory on its photographs."""

import argparse
import json
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import mean, median
from typing import NamedTuple

import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import DATASETS, init_default_scope
from mmengine.runner.checkpoint import find_latest_checkpoint
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rows import RESULTS, Row, read_rows, tasks
from torch import nn

from mmtoken.analysis.cost import measure_cost
from mmtoken.analysis.environment import describe_environment
from mmtoken.analysis.recording import load_model
from mmtoken.analysis.resident_memory import CLEAR_REFS, resident_peak_mb
from mmtoken.analysis.spread import spread
from mmtoken.files import replacing

DESCRIPTION = """\
Measure the trained rows of benchmarks/study/TASK.yml on photographs of the test set, with the
choices that each network makes on them, and write benchmarks/study/results/TASK/cost.json, or
cost_batchN.json for batches of N photographs:

  ms            the model, for a photograph: from pixels to scores of the photograph's own size
  over photos   standard deviation of these over batches
  backbone ms   the backbone alone, inside of the same calls
  G MACs        of the backbone, for a photograph
  MiB           peak of memory of a call above what the model holds

All models are in one process and run in turn, batch by batch, so that their times can be compared;
the figure of a round is the mean over photographs, and the median over rounds is shown.
Rows without a checkpoint in work_dirs/study are left out.

With --beside, rows are added to a file of before: they are measured together with a row that is in
it, and their times are scaled by what that row took then over what it takes now.
"""


def main() -> int:
    """Measure and write; return 0."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    trained = [
        first for row in read_rows(args.task).values() for first in trainings(row, args.seed)[:1]
    ]
    if args.rows:
        if unknown := set(args.rows) - {row.name for row, *_ in trained}:
            raise SystemExit(f'no checkpoint in work_dirs/study of {", ".join(sorted(unknown))}')
        trained = [found for found in trained if found.row.name in args.rows]
    if not trained:
        raise SystemExit(f'no row of {args.task}.yml has a checkpoint in work_dirs/study')
    suffix = '' if args.batch_size == 1 else f'_batch{args.batch_size}'
    file = RESULTS / args.task / f'cost{suffix}.json'
    before = json.loads(file.read_text()) if file.exists() else dict(rows={})
    names = [row.name for row, *_ in trained]
    if args.beside:
        check_beside(args, names, before, file)
    elif lost := before['rows'].keys() - set(names):
        raise SystemExit(
            f'{file} has rows that would be lost, {", ".join(sorted(lost))}: measure them too, or '
            'move the file away, or add new rows with --beside'
        )
    costs = measure(trained, args)
    if args.beside:
        costs = dict(before, rows=before['rows'] | scaled_rows(costs, before, args.beside))
    with replacing(file) as new:
        new.write_text(json.dumps(costs, indent=2) + '\n')
    report({name: costs['rows'][name] for name in names})
    return 0


def check_beside(args: argparse.Namespace, names: list[str], before: dict, file: Path) -> None:
    """Refuse to add rows that are there, or without the row beside which they are timed.

    Raises:
        SystemExit: Says what is missing or in the way.
    """
    if args.beside not in before['rows']:
        raise SystemExit(f'--beside {args.beside}: {file} has no such row')
    if args.beside not in names:
        raise SystemExit(f'--beside {args.beside}: give it with the new ones as --rows')
    if there := before['rows'].keys() & (set(names) - {args.beside}):
        raise SystemExit(f'{file} has {", ".join(sorted(there))} already')
    for name in ('photos', 'batch_size', 'threads'):
        if before[name] != getattr(args, name):
            raise SystemExit(f'{file} has {name} {before[name]}, not {getattr(args, name)}')


def scaled_rows(costs: dict, before: dict, beside: str) -> dict[str, dict]:
    """New rows in the milliseconds of ``before``."""
    now, then = (c['rows'][beside]['ms']['median'] for c in (costs, before))
    scaled = {}
    for name, cost in costs['rows'].items():
        if name == beside:
            continue
        times = {
            key: {k: None if v is None else v * then / now for k, v in cost[key].items()}
            for key in ('ms', 'ms_by_batch', 'backbone_ms')
        }
        origin = dict(row=beside, ms=now, environment=costs['environment'])
        scaled[name] = cost | times | dict(beside=origin)
    return scaled


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('task', choices=tasks())
    parser.add_argument('--rows', nargs='+', metavar='ROW', help='these alone (default: all)')
    parser.add_argument(
        '--beside', metavar='ROW', help='one of --rows that has been measured: add the others'
    )
    parser.add_argument('--batch-size', type=int, default=1, metavar='N', help='default: 1')
    parser.add_argument(
        '--seed', type=int, help='whose checkpoints (default: the first that a row has)'
    )
    parser.add_argument('--photos', type=int, default=8, help='of the test set (default: 8)')
    parser.add_argument('--rounds', type=int, default=3, help='of timing (default: 3)')
    parser.add_argument('--threads', type=int, default=1, help='of the CPU (default: 1)')
    return parser.parse_args()


class Trained(NamedTuple):
    """One training of a row, and its last checkpoint."""

    row: Row
    seed: int
    checkpoint: str


def trainings(row: Row, seed: int | None = None) -> list[Trained]:
    """The finished trainings of a row that have a checkpoint, or that of one seed alone."""
    results = RESULTS.glob(f'{row.task}/{row.name}_seed*.json')
    seeds = sorted(int(path.stem.rpartition('_seed')[2]) for path in results)
    found = [
        Trained(row, finished, find_latest_checkpoint(row.work_dir(finished)))
        for finished in seeds
        if seed in (None, finished) and row.work_dir(finished).is_dir()
    ]
    return [training for training in found if training.checkpoint]


class TimedModel:
    """A trained model, its photographs, and a clock on its backbone."""

    def __init__(self, trained: Trained, photos: int, batch_size: int) -> None:
        cfg = trained.row.load(trained.seed)
        cfg.model.backbone.pop('init_cfg', None)  # the checkpoint has all
        self.trained, self.row = trained, trained.row
        self.model = load_model(cfg, trained.checkpoint)
        self.batch_size = batch_size
        self.batches = load_photos(cfg, photos, batch_size)
        self.backbone_seconds = 0.0
        self.model.backbone.register_forward_pre_hook(self._start)
        self.model.backbone.register_forward_hook(self._stop)

    def _start(self, module: nn.Module, inputs: tuple) -> None:
        self.started = time.perf_counter()

    def _stop(self, module: nn.Module, inputs: tuple, outputs) -> None:
        self.backbone_seconds = time.perf_counter() - self.started

    @torch.no_grad()
    def run(self, index: int) -> tuple[float, float]:
        """Milliseconds of the model and of its backbone for a photograph of a batch."""
        started = time.perf_counter()
        with self.row.choices():
            self.model.test_step(self.batches[index])
        seconds = (time.perf_counter() - started, self.backbone_seconds)
        return tuple(1e3 * s / self.batch_size for s in seconds)

    def macs(self, index: int) -> float:
        """Billions of multiply-accumulates of the backbone for a photograph of a batch."""
        batch = self.model.data_preprocessor(self.batches[index], False)
        with torch.no_grad():
            cost = measure_cost(
                self.model.backbone,
                batch['inputs'],
                batch_size=self.batch_size,
                context=self.row.choices,
            )
        return cost.macs / 1e9


def load_photos(cfg: Config, number: int, batch_size: int) -> list[dict]:
    """Batches of photographs, evenly over the test set.

    Raises:
        SystemExit: Photographs have different sizes, or there are too few.
    """
    init_default_scope(cfg.default_scope)
    dataset = DATASETS.build(cfg.test_dataloader.dataset)
    number = min(number, len(dataset)) // batch_size * batch_size
    photos = [dataset[i * len(dataset) // number] for i in range(number)]
    if not photos or len({photo['inputs'].shape for photo in photos}) > 1 < batch_size:
        raise SystemExit(f'--batch-size {batch_size}: not enough photographs of one size')
    return [pseudo_collate(photos[i : i + batch_size]) for i in range(0, number, batch_size)]


def measure(trained: list[Trained], args: argparse.Namespace) -> dict:
    """What the JSON holds."""
    models = [TimedModel(found, args.photos, args.batch_size) for found in trained]
    batches = range(len(models[0].batches))
    for model in track(models, 'Warming up'):
        model.run(0)
    times = {model.row.name: [] for model in models}  # of each round: of each batch
    for turn in track(range(args.rounds), 'Timing'):
        for of_rounds in times.values():
            of_rounds.append([])
        for batch in batches:
            for model in models[:: -1 if (turn + batch) % 2 else 1]:
                times[model.row.name][-1].append(model.run(batch))
    results = {}
    for model in track(models, 'Counting'):
        name = model.row.name
        whole, backbone = (
            [[pair[i] for pair in of_batches] for of_batches in times[name]] for i in range(2)
        )
        results[name] = dict(
            ms=spread([mean(of_batches) for of_batches in whole]),
            ms_by_batch=spread([median(of_rounds) for of_rounds in zip(*whole, strict=True)]),
            backbone_ms=spread([mean(of_batches) for of_batches in backbone]),
            gmacs=spread([model.macs(batch) for batch in batches]),
            peak_mb=peak_mb(model.trained, args),
        )
    return dict(
        photos=len(batches) * args.batch_size,
        batch_size=args.batch_size,
        rounds=args.rounds,
        threads=args.threads,
        environment=describe_environment(torch.device('cpu')),
        rows=results,
    )


def peak_mb(trained: Trained, args: argparse.Namespace) -> float | None:
    """Peak of memory in a process of its own; None without Linux."""
    if not CLEAR_REFS.exists():
        return None
    context = multiprocessing.get_context('spawn')
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(_peak, trained, args).result()


def _peak(trained: Trained, args: argparse.Namespace) -> float:
    torch.set_num_threads(args.threads)
    model = TimedModel(trained, args.batch_size, args.batch_size)
    with torch.no_grad():
        model.model.backbone(torch.rand(1, 3, 64, 64))  # loads libraries and starts threads
    return resident_peak_mb(lambda: model.run(0))


def report(rows: dict) -> None:
    """Print a table."""
    table = Table('row', box=SIMPLE_HEAD)
    for column in ('ms', 'over photos', 'backbone ms', 'G MACs', 'MiB'):
        table.add_column(column, justify='right')
    for name, cost in rows.items():
        over_photos = cost['ms_by_batch']['std']  # None of a single batch
        table.add_row(
            name,
            f'{cost["ms"]["median"]:.0f}',
            '' if over_photos is None else f'± {over_photos:.0f}',
            f'{cost["backbone_ms"]["median"]:.0f}',
            f'{cost["gmacs"]["mean"]:.1f}',
            f'{cost["peak_mb"] or 0:.0f}',
        )
    Console().print(table)


if __name__ == '__main__':
    raise SystemExit(main())
