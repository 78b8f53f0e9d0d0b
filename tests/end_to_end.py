"""What the end-to-end tests share: running the libraries' tools as a user does."""

import json
import multiprocessing
import os
import re
import runpy
import sys
from pathlib import Path

import mmdet
import mmseg
from metafiles import cache_metafiles

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / 'configs'
TRAIN, TEST = (ROOT / 'tools' / name for name in ('train.py', 'test.py'))
STOCK = {library: Path(library.__file__).parent / '.mim' / 'tools' for library in (mmdet, mmseg)}

ONE_PROCESS = [
    f'{split}_dataloader.{key}'
    for split in ('train', 'val', 'test')
    for key in ('num_workers=0', 'persistent_workers=False')
] + ['randomness.seed=0']
# After so few steps no score is high, and without any detection mmdet reports no AP at all.
ANY_SCORE = 'model.test_cfg.rcnn.score_thr=0.0'
SHORT_DETECTION = [
    'train_cfg.max_epochs=1', 'train_cfg.val_interval=1', ANY_SCORE,
    'model.test_cfg.rpn.max_per_img=50', 'model.train_cfg.rcnn.sampler.num=32',
]  # fmt: skip
SHORT_SEGMENTATION = [
    'train_cfg.max_iters=2', 'train_cfg.val_interval=2', 'default_hooks.checkpoint.interval=2',
]  # fmt: skip
FROM_SCRATCH = 'load_from=None'

# Each tool runs in a fork of one process that has imported the libraries, but not mmtoken: half
# the time of a short run would be imports.
_FORKS = multiprocessing.get_context('forkserver')
_FORKS.set_forkserver_preload(['mmdet.apis', 'mmdet.utils', 'mmseg.apis', 'mmpretrain.apis'])


def run_tool(folder: Path, tool: Path, *args, options=()) -> tuple[int, str]:
    """``python tool args --cfg-options options`` in a folder: its exit status and its output."""
    args = [*args, '--cfg-options', *options] if options else args
    output = folder / 'output.txt'
    process = _FORKS.Process(target=_run, args=(str(tool), [*map(str, args)], folder, output))
    process.start()
    process.join()
    return process.exitcode, output.read_text()


def _run(tool: str, args: list[str], folder: Path, output: Path) -> None:
    assert 'mmtoken' not in sys.modules
    with output.open('w') as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    cache_metafiles()
    os.chdir(folder)
    sys.argv = [tool, *args]
    sys.path.insert(0, str(Path(tool).parent))
    runpy.run_path(tool, run_name='__main__')


def run(folder: Path, tool: Path, *args, options=()) -> str:
    """The output of a tool that must succeed."""
    status, output = run_tool(folder, tool, *args, options=options)
    assert status == 0, output[-4000:]
    return output


def train(folder: Path, tool: Path, config: Path, options: list[str]) -> tuple[Path, str]:
    """Train; the last checkpoint and the output."""
    work_dir = folder / 'work_dirs' / config.stem
    output = run(folder, tool, config, '--work-dir', work_dir, options=options)
    return Path((work_dir / 'last_checkpoint').read_text()), output


def scores(output: str, name: str) -> list[float]:
    """All values that were printed of a metric."""
    return [float(value) for value in re.findall(rf'\b{name}: +([-\d.]+)', output)]


def logged_steps(work_dir: Path) -> list[dict]:
    """What the runner logged of each training step."""
    logs = work_dir.glob('*/vis_data/scalars.json')
    lines = [json.loads(line) for log in logs for line in log.read_text().splitlines()]
    return [line for line in lines if 'loss' in line]
