"""Train, evaluate and draw a detector and a segmenter on the embedded data set."""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / 'configs' / 'shapes'
EPILOG = """\
examples:
  python tools/demo.py           the whole demo: at most 20 minutes on two CPU cores
  python tools/demo.py --quick   the same steps in a minute; the scores mean nothing
  python tools/demo.py --twin    the dense twins as well: twice the time
"""
console = Console()


@dataclass
class Run:
    """One model of the demo: how to train it, and its results."""

    name: str
    config: Path
    layout: str  # of the data: 'coco' or 'ade'
    quick_options: tuple[str, ...]
    scores: dict[str, float] = field(default_factory=dict)  # from 0 to 1, by column
    checkpoint: Path | None = None
    parameters: int = 0
    macs: int = 0
    train_seconds: float = 0
    test_seconds: float = 0


DETECTION = dict(
    layout='coco',
    quick_options=(
        'train_cfg.max_epochs=1',
        'train_cfg.val_interval=1',
        'model.test_cfg.rcnn.score_thr=0.0',  # mmdet gives no AP without detections
    ),
)
SEGMENTATION = dict(
    layout='ade',
    quick_options=(
        'train_cfg.max_iters=10',
        'train_cfg.val_interval=10',
        'default_hooks.checkpoint.interval=10',
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
        console.print('This was the quick demo: its scores only show that everything runs.')
    console.print(f'Done in {(time.time() - started) / 60:.1f} minutes.')


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--quick', action='store_true', help='only a few training iterations')
    parser.add_argument('--twin', action='store_true', help='train the dense twins as well')
    parser.add_argument('--out', default='work_dirs/demo', help='folder (default: %(default)s)')
    return parser.parse_args()


def prepare_data(data: Path, quick: bool) -> None:
    """Make the embedded data set if it does not exist.

    Raises:
        SystemExit: ``data`` is another folder.
    """
    if (data / 'shapes.json').is_file():
        console.print(f'Data: using {data}')
        return
    console.print(f'Data: making {data}')
    command = [sys.executable, ROOT / 'tools' / 'datasets' / 'make_shapes.py', '--out', data]
    sizes = ['--train', '32', '--val', '8'] if quick else []
    if subprocess.run([*command, *sizes], stdout=subprocess.DEVNULL).returncode:
        sys.exit(1)  # its message is on the screen


def train_and_test(run: Run, out: Path, data: Path, quick: bool) -> None:
    """Run the library's own train.py and test.py, and read the scores that test.py logged."""
    from mmtoken.analysis.training_log import METRICS, last_scores

    work_dir = out / run.config.stem
    options = [*data_options(run, data), *(run.quick_options if quick else ())]
    run.train_seconds = follow(run, 'train', work_dir, out, options)
    run.checkpoint = Path((work_dir / 'last_checkpoint').read_text().strip())
    run.test_seconds = follow(run, 'test', work_dir, out, options)
    found = last_scores(work_dir)
    run.scores = {METRICS[name].label: score / 100 for name, score in found.items()}


def data_options(run: Run, data: Path) -> list[str]:
    """Config overrides that point a config to another copy of the data."""
    if data == Path('data/shapes'):
        return []
    if run.layout == 'ade':
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


def follow(run: Run, tool: str, work_dir: Path, out: Path, options: list[str]) -> float:
    """Run one of our tools, with its log in a file and its progress on the screen.

    Returns:
        Seconds it took.

    Raises:
        SystemExit: The tool failed; its last lines are shown.
    """
    from mmtoken.analysis.training_log import describe_progress

    title = f'{run.name}: {tool}ing'
    files = [run.config] if tool == 'train' else [run.config, run.checkpoint]
    command = [sys.executable, ROOT / 'tools' / f'{tool}.py', *files, '--work-dir', work_dir]
    if options:
        command += ['--cfg-options', *options]
    out.mkdir(parents=True, exist_ok=True)
    log = out / f'{tool}_{run.config.stem}.log'
    started = time.time()
    with log.open('w') as file, console.status(title) as status:
        process = subprocess.Popen(list(map(str, command)), stdout=file, stderr=subprocess.STDOUT)
        while process.poll() is None:
            time.sleep(0.5)
            done = f', {describe_progress(work_dir)}' if tool == 'train' else ''
            status.update(f'{title} ({time.time() - started:.0f} s{done})')
    if process.returncode:
        console.print(''.join(log.read_text().splitlines(keepends=True)[-20:]), markup=False)
        sys.exit(f'{title} failed; see {log}')
    seconds = time.time() - started
    console.print(f'{title} took {seconds:.0f} s')
    return seconds


@contextmanager
def output_to(log: Path) -> Iterator[None]:
    """Send the output of libraries to a file, so that the screen shows the demo alone."""
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
