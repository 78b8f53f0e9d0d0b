"""Train, evaluate and draw a detector and a segmenter on the embedded data set."""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / 'tools' / 'datasets'))
CONFIGS = ROOT / 'configs' / 'shapes'
EPILOG = """\
examples:
  python tools/demo.py           the whole demo, at most 20 minutes on two CPU cores
  python tools/demo.py --quick   the same path in two minutes; its scores mean nothing
  python tools/demo.py --twin    also the dense twins, for comparison: twice the time
"""
console = Console()


@dataclass
class Run:
    """One model of the demo: how to train it, and what came of it."""

    name: str
    config: Path
    metrics: dict[str, str]  # column of the table -> metric in the log
    quick_options: tuple[str, ...]
    scores: dict[str, float] = field(default_factory=dict)
    checkpoint: Path | None = None
    parameters: int = 0
    macs: int = 0
    train_seconds: float = 0
    test_seconds: float = 0


DETECTION = dict(
    metrics={'box AP': 'coco/bbox_mAP', 'mask AP': 'coco/segm_mAP'},
    quick_options=(
        'train_cfg.max_epochs=2',
        'train_cfg.val_interval=2',
        'model.test_cfg.rcnn.score_thr=0.0',  # without any detection there would be no AP
    ),
)
SEGMENTATION = dict(
    metrics={'mIoU': 'mIoU'},
    quick_options=(
        'train_cfg.max_iters=30',
        'train_cfg.val_interval=30',
        'default_hooks.checkpoint.interval=30',
    ),
)
MASK_RCNN = 'mask-rcnn_stvit-r-swin-nano{}_fpn_1xb8-7e_shapes.py'
UPERNET = 'upernet_stvit-r-swin-nano{}_1xb16-750i_shapes-128x128.py'
RUNS = [
    Run('Mask R-CNN, STViT-R', CONFIGS / MASK_RCNN.format(''), **DETECTION),
    Run('UPerNet, STViT-R', CONFIGS / UPERNET.format(''), **SEGMENTATION),
]
TWINS = [
    Run('Mask R-CNN, dense twin', CONFIGS / MASK_RCNN.format('-dense'), **DETECTION),
    Run('UPerNet, dense twin', CONFIGS / UPERNET.format('-dense'), **SEGMENTATION),
]


def main() -> None:
    args = parse_args()
    out = Path(args.out)
    runs = RUNS + (TWINS if args.twin else [])
    started = time.time()

    data = out / 'data' if args.quick else Path('data/shapes')
    prepare_data(data, quick=args.quick)
    for run in runs:
        train_and_test(run, out, data, quick=args.quick)
        with output_to(out / 'measure.log'):
            measure(run)

    with output_to(out / 'pictures.log'):
        from demo_pictures import draw_detections, draw_segmentations  # imports mmdet and mmseg

        pictures = [draw_detections(RUNS[0], data, out), draw_segmentations(RUNS[1], data, out)]
    report(runs, out)
    console.print('Pictures: ' + ', '.join(map(str, pictures)))
    if args.quick:
        console.print('This was the quick demo: its scores only show that the path works.')
    console.print(f'Done in {(time.time() - started) / 60:.1f} minutes.')


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--quick', action='store_true', help='a look at the path, no real training')
    parser.add_argument('--twin', action='store_true', help='train the dense twins as well')
    parser.add_argument('--out', default='work_dirs/demo', help='folder (default: %(default)s)')
    return parser.parse_args()


def prepare_data(data: Path, quick: bool) -> None:
    """Make the embedded data set unless it is there."""
    from shapes import make_dataset

    if (data / 'shapes.json').is_file():
        console.print(f'Data: {data} is there, and is used as it is.')
        return
    console.print(f'Data: making {data}')
    sizes = dict(num_train=120, num_val=40) if quick else {}
    try:
        make_dataset(data, **sizes, workers=os.cpu_count() or 1, show_progress=True)
    except FileExistsError as error:  # a folder of the user's
        sys.exit(str(error))


def train_and_test(run: Run, out: Path, data: Path, quick: bool) -> None:
    """Run the library's own train.py and test.py, and read the scores that test.py wrote."""
    work_dir = out / run.config.stem
    common = ['--work-dir', work_dir]
    options = [*data_options(run, data), *(run.quick_options if quick else ())]

    started = time.time()
    follow(f'{run.name}: training', out, 'train', run.config, *common, options=options)
    run.train_seconds = time.time() - started
    run.checkpoint = Path((work_dir / 'last_checkpoint').read_text().strip())

    started = time.time()
    follow(
        f'{run.name}: testing', out, 'test', run.config, run.checkpoint, *common, options=options
    )
    run.test_seconds = time.time() - started
    run.scores = read_scores(run, work_dir)


def data_options(run: Run, data: Path) -> list[str]:
    """Config overrides that point a config to another copy of the data."""
    if data == Path('data/shapes'):
        return []
    if 'mIoU' in run.metrics:
        root = data / 'ade' / 'ADEChallengeData2016'
        return [
            f'{split}_dataloader.dataset.data_root={root}' for split in ('train', 'val', 'test')
        ]
    root = data / 'coco'
    annotations = root / 'annotations' / 'instances_val2017.json'
    return [
        *(f'{split}_dataloader.dataset.data_root={root}' for split in ('train', 'val', 'test')),
        f'val_evaluator.ann_file={annotations}',
        f'test_evaluator.ann_file={annotations}',
    ]


def follow(title: str, out: Path, tool: str, config: Path, *arguments, options: list[str]) -> None:
    """Run one of our tools with its log in a file and its progress on the screen.

    Raises:
        SystemExit: The tool failed; its last lines are shown.
    """
    command = [sys.executable, *map(str, (ROOT / 'tools' / f'{tool}.py', config, *arguments))]
    if options:
        command += ['--cfg-options', *options]
    out.mkdir(parents=True, exist_ok=True)
    log = out / f'{tool}_{config.stem}.log'
    columns = (
        TextColumn('{task.description}'),
        BarColumn(),
        TextColumn('{task.percentage:3.0f}%'),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with log.open('w') as file, Progress(*columns, console=console) as progress:
        task = progress.add_task(f'{title:40s}', total=1)
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1,
            env={**os.environ, 'PYTHONUNBUFFERED': '1'},
        )  # fmt: skip
        for line in process.stdout:
            file.write(line)
            done = fraction_done(line, tool)
            if done is not None:
                progress.update(task, completed=done)
        if process.wait() == 0:
            progress.update(task, completed=1)
    if process.returncode:
        console.print(''.join(log.read_text().splitlines(keepends=True)[-20:]), markup=False)
        sys.exit(f'{title} failed; the whole log is in {log}')


@contextmanager
def output_to(log: Path) -> Iterator[None]:
    """Send what libraries print and warn of to a file, to keep the screen for the demo."""
    sys.stdout.flush()
    screen = os.dup(1), os.dup(2)
    with log.open('w') as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for stream, saved in enumerate(screen, start=1):
                os.dup2(saved, stream)
                os.close(saved)


def fraction_done(line: str, tool: str) -> float | None:
    """How far a line of MMEngine's log says a run has come, None if it says nothing."""
    match = re.search(r'(Epoch|Iter)\((\w+)\) *(?:\[(\d+)\])?\[ *(\d+)/(\d+)\](.*)', line)
    if match is None or match[2] != tool:
        return None
    epoch, step, steps = int(match[3] or 1), int(match[4]), int(match[5])
    if tool == 'test' or match[1] == 'Iter':
        return step / steps
    remaining = re.search(r'eta: (?:(\d+) days?, )?(\d+):(\d+):(\d+).*? time: ([\d.]+)', match[6])
    if remaining is None:
        return None
    days, hours, minutes, seconds = (int(g or 0) for g in remaining.groups()[:4])
    left = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    spent = ((epoch - 1) * steps + step) * float(remaining[5])
    return spent / max(spent + left, 1e-9)


def read_scores(run: Run, work_dir: Path) -> dict[str, float]:
    """The newest metrics that test.py wrote into ``work_dir``, fractions of one."""
    newest = max(work_dir.glob('*/*.json'), key=lambda path: path.stat().st_mtime)
    metrics = json.loads(newest.read_text())
    scale = 100 if 'mIoU' in run.metrics else 1  # mmseg gives percentages
    return {column: metrics[key] / scale for column, key in run.metrics.items()}


def measure(run: Run) -> None:
    """Count the model's parameters and its backbone's multiply-accumulates."""
    import torch
    from mmengine.config import Config
    from mmengine.registry import MODELS, init_default_scope

    from mmtoken.analysis import measure_cost

    cfg = Config.fromfile(run.config)
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model).eval()
    run.parameters = sum(p.numel() for p in model.parameters())
    run.macs = measure_cost(model.backbone, torch.zeros(1, 3, 160, 224)).macs


def report(runs: list[Run], out: Path) -> None:
    """Print the results as a table and keep them in ``results.json``."""
    columns = ['box AP', 'mask AP', 'mIoU']
    table = Table(
        title='The embedded data set, trained from scratch', box=SIMPLE_HEAD, pad_edge=False
    )
    table.add_column('model', no_wrap=True)
    for column in [*columns, 'params', 'MACs*', 'seconds']:
        table.add_column(column, justify='right', no_wrap=True)
    for run in runs:
        scores = [f'{run.scores[c]:.3f}' if c in run.scores else '' for c in columns]
        seconds = f'{run.train_seconds:.0f} + {run.test_seconds:.0f}'
        table.add_row(
            run.name, *scores, f'{run.parameters / 1e6:.2f} M', f'{run.macs / 1e9:.2f} G', seconds
        )
    console.print(table)
    console.print('* the backbone, one image of 160 x 224. Seconds: training + testing.')
    results = [
        dict(
            model=run.name, config=run.config.name, checkpoint=str(run.checkpoint), **run.scores,
            parameters=run.parameters, backbone_macs=run.macs,
            train_seconds=round(run.train_seconds), test_seconds=round(run.test_seconds),
        )
        for run in runs
    ]  # fmt: skip
    (out / 'results.json').write_text(json.dumps(results, indent=2) + '\n')


if __name__ == '__main__':
    main()
