"""Measure trained rows of the study: time, multiply-accumulates and memory on its photographs."""

import argparse
import json
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor

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
choices that each network makes on them, and write benchmarks/study/results/TASK/cost.json:

  ms            the model: from pixels to scores of the photograph's own size
  backbone ms   the backbone alone, inside of the same calls
  G MACs        of the backbone
  MiB           peak of memory of a call above what the model holds

All models are in one process and run in turn, photograph by photograph, so that their times can be
compared; the figure of a round is the mean over photographs, and the median over rounds is shown.
Rows without a checkpoint in work_dirs/study are left out.
"""


def main() -> int:
    """Measure and write; return 0."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    rows = [row for row in read_rows(args.task).values() if checkpoint(row, args.seed)]
    if not rows:
        raise SystemExit(f'no row of {args.task}.yml has a checkpoint in work_dirs/study')
    costs = measure(rows, args)
    with replacing(RESULTS / args.task / 'cost.json') as new:
        new.write_text(json.dumps(costs, indent=2) + '\n')
    report(costs['rows'])
    return 0


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('task', choices=tasks())
    parser.add_argument('--seed', type=int, default=0, help='whose checkpoints (default: 0)')
    parser.add_argument('--photos', type=int, default=8, help='of the test set (default: 8)')
    parser.add_argument('--rounds', type=int, default=3, help='of timing (default: 3)')
    parser.add_argument('--threads', type=int, default=1, help='of the CPU (default: 1)')
    return parser.parse_args()


def checkpoint(row: Row, seed: int) -> str | None:
    """The last checkpoint of a row's training; None if there is none."""
    folder = row.work_dir(seed)
    return find_latest_checkpoint(folder) if folder.is_dir() and row.result(seed).exists() else None


class TimedModel:
    """A trained model, its photographs, and a clock on its backbone."""

    def __init__(self, row: Row, seed: int, photos: int) -> None:
        cfg = row.load(seed)
        cfg.model.backbone.pop('init_cfg', None)  # the checkpoint has all
        self.row = row
        self.model = load_model(cfg, checkpoint(row, seed))
        self.batches = load_photos(cfg, photos)
        self.backbone_seconds = 0.0
        self.model.backbone.register_forward_pre_hook(self._start)
        self.model.backbone.register_forward_hook(self._stop)

    def _start(self, module: nn.Module, inputs: tuple) -> None:
        self.started = time.perf_counter()

    def _stop(self, module: nn.Module, inputs: tuple, outputs) -> None:
        self.backbone_seconds = time.perf_counter() - self.started

    @torch.no_grad()
    def run(self, index: int) -> tuple[float, float]:
        """Milliseconds of the model and of its backbone on one photograph."""
        started = time.perf_counter()
        with self.row.choices():
            self.model.test_step(self.batches[index])
        return 1e3 * (time.perf_counter() - started), 1e3 * self.backbone_seconds

    def macs(self, index: int) -> float:
        """Billions of multiply-accumulates of the backbone on one photograph."""
        batch = self.model.data_preprocessor(self.batches[index], False)
        with torch.no_grad():
            cost = measure_cost(self.model.backbone, batch['inputs'], context=self.row.choices)
        return cost.macs / 1e9


def load_photos(cfg: Config, number: int) -> list[dict]:
    """Batches of one photograph, evenly over the test set."""
    init_default_scope(cfg.default_scope)
    dataset = DATASETS.build(cfg.test_dataloader.dataset)
    number = min(number, len(dataset))
    return [pseudo_collate([dataset[i * len(dataset) // number]]) for i in range(number)]


def measure(rows: list[Row], args: argparse.Namespace) -> dict:
    """What the JSON holds."""
    models = [TimedModel(row, args.seed, args.photos) for row in rows]
    photos = range(len(models[0].batches))
    for model in track(models, 'Warming up'):
        model.run(0)
    times = {model.row.name: [] for model in models}
    for turn in track(range(args.rounds), 'Timing'):
        sums = {name: [0.0, 0.0] for name in times}
        for photo in photos:
            for model in models[:: -1 if (turn + photo) % 2 else 1]:
                for i, value in enumerate(model.run(photo)):
                    sums[model.row.name][i] += value / len(photos)
        for name, pair in sums.items():
            times[name].append(pair)
    results = {}
    for model in track(models, 'Counting'):
        name = model.row.name
        whole, backbone = zip(*times[name], strict=True)
        results[name] = dict(
            ms=spread(whole),
            backbone_ms=spread(backbone),
            gmacs=spread([model.macs(photo) for photo in photos]),
            peak_mb=peak_mb(model.row, args.seed, args.threads),
        )
    return dict(
        photos=len(photos),
        rounds=args.rounds,
        threads=args.threads,
        environment=describe_environment(torch.device('cpu')),
        rows=results,
    )


def peak_mb(row: Row, seed: int, threads: int) -> float | None:
    """Peak of memory in a process of its own; None without Linux."""
    if not CLEAR_REFS.exists():
        return None
    context = multiprocessing.get_context('spawn')
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(_peak, row, seed, threads).result()


def _peak(row: Row, seed: int, threads: int) -> float:
    torch.set_num_threads(threads)
    model = TimedModel(row, seed, photos=1)
    with torch.no_grad():
        model.model.backbone(torch.rand(1, 3, 64, 64))  # loads libraries and starts threads
    return resident_peak_mb(lambda: model.run(0))


def report(rows: dict) -> None:
    """Print a table."""
    table = Table('row', box=SIMPLE_HEAD)
    for column in ('ms', 'backbone ms', 'G MACs', 'MiB'):
        table.add_column(column, justify='right')
    for name, cost in rows.items():
        table.add_row(
            name, f'{cost["ms"]["median"]:.0f}', f'{cost["backbone_ms"]["median"]:.0f}',
            f'{cost["gmacs"]["mean"]:.1f}', f'{cost["peak_mb"] or 0:.0f}',
        )  # fmt: skip
    Console().print(table)


if __name__ == '__main__':
    raise SystemExit(main())
