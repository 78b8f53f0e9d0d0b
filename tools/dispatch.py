"""Run a config with the tool of the library it is written for: mmdet, mmseg or mmpretrain."""

from __future__ import annotations

import json
import runpy
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmengine.config import Config

CONFIG_SUFFIXES = ('.py', '.json', '.yaml', '.yml')
USAGE = """\
usage: mmtoken {tool} CONFIG {arguments}[options]

Runs the {tool}.py of mmdet, mmseg or mmpretrain, according to the config's `default_scope` or the
class of its model. CONFIG is a file, or as in mmdet::pvt/retinanet_pvt-t_fpn_1x_coco.py one that an
installed library ships. All other arguments are passed on unchanged. The usual options:

  --work-dir DIR           where logs and checkpoints go (default: work_dirs/NAME_OF_CONFIG)
{options}  --cfg-options KEY=VALUE  override settings of the config
  --launcher pytorch       set by tools/dist_{tool}.sh; tools/slurm_{tool}.sh sets `slurm`

All options of a config's library: mmtoken {tool} CONFIG --help
"""
ARGUMENTS = dict(train='', test='CHECKPOINT ')
OPTIONS = dict(
    train="""\
  --amp                    mixed precision (needs a GPU)
  --resume                 continue from the latest checkpoint in the work dir
  --auto-scale-lr          scale the learning rate to the batch size (mmdet, mmpretrain)
""",
    test="""\
  --show-dir DIR           draw the predictions
  --out FILE               save the predictions
  --tta                    test-time augmentation
""",
)


def main(tool: str) -> None:
    """Run ``tool`` ('train' or 'test') with this process's arguments."""
    arguments = sys.argv[1:]
    config = given_config(arguments)
    if config is None:
        wanted = {'-h', '--help'} & set(arguments)
        if arguments and not wanted and not arguments[0].startswith('-'):
            sys.exit(f'{tool}.py: {no_config(arguments[0])}')
        print(USAGE.format(tool=tool, arguments=ARGUMENTS[tool], options=OPTIONS[tool]))
        sys.exit(0 if wanted else 2)
    # Importing mmtoken first lets configs inherit from mmtoken:: configs.
    from mmtoken.library import find_config, library_of, read_config, shipped_file

    try:
        cfg = read_config(config)
        stock_tool = shipped_file(library_of(cfg), f'tools/{tool}.py')
        if tool == 'test' and 'backbone' in cfg.get('model', {}):
            check_checkpoint(arguments[arguments.index(config) + 1 :])
        if tool == 'train' and '--resume' in arguments:
            check_latest(work_dir_of(cfg, config, arguments), arguments)
    except (OSError, ValueError) as error:
        sys.exit(f'{tool}.py: {error}')
    # The libraries' tools take files only.
    sys.argv[1 + arguments.index(config)] = str(find_config(config))
    sys.argv += join_on_cpu(cfg, arguments)
    try:
        runpy.run_path(str(stock_tool), run_name='__main__')
    except json.JSONDecodeError as error:
        sys.exit(f'{tool}.py: {broken_annotations(cfg) or "a file of annotations"}: {error}')


def broken_annotations(cfg: Config) -> str | None:
    """The first file of annotations in a config that is no JSON, of which the error has no name."""
    datasets = [cfg.get(f'{split}_dataloader') for split in ('train', 'val', 'test')]
    while datasets:
        part = datasets.pop(0)
        if isinstance(part, dict):
            datasets += part.values()
            file = Path(part.get('data_root') or '', part.get('ann_file') or '')
            if file.suffix == '.json' and file.is_file():
                try:
                    json.loads(file.read_bytes())
                except ValueError:
                    return str(file)
        elif isinstance(part, (list, tuple)):
            datasets += part
    return None


def join_on_cpu(cfg: Config, arguments: list[str]) -> list[str]:
    """Form the group of processes of ``--launcher pytorch`` on a machine without devices.

    MMEngine would give each process, and its copy of the model, a GPU, whatever the backend. It
    uses a group that exists, and what a config says of the wrapper of a model.

    Returns:
        Arguments that the library's tool needs beside the given ones.
    """
    if '--launcher=pytorch' not in arguments and '--launcher pytorch' not in ' '.join(arguments):
        return []
    from mmengine.device import get_device
    from torch import distributed

    if get_device() != 'cpu':
        return []
    distributed.init_process_group('gloo')
    wrapper = dict(
        type='MMDistributedDataParallel',
        device_ids=None,
        find_unused_parameters=cfg.get('find_unused_parameters', False),
    )
    return ['--cfg-options', *(f'model_wrapper_cfg.{k}={v}' for k, v in wrapper.items())]


def check_checkpoint(arguments: list[str]) -> None:
    """Check that a checkpoint holds a trained model; MMEngine would test random weights instead.

    Args:
        arguments: Those after the config.

    Raises:
        OSError, ValueError: It cannot be read, or holds the weights of a backbone alone.
    """
    from mmtoken.checkpoints import find_weights, read_checkpoint
    from mmtoken.checkpoints.download import find_local

    if not arguments or arguments[0].startswith('-'):
        return  # the library's tool reports what is missing
    file = find_local(arguments[0])
    if file is None:
        return
    names = list(find_weights(read_checkpoint(file), file))
    if not any('backbone.' in name for name in names):
        beginnings = sorted({name.partition('.')[0] for name in names})[:6]
        raise ValueError(
            f'{file} holds no trained model: none of its {len(names)} names has a `backbone.`, '
            f'they begin with {", ".join(beginnings)}. Give the checkpoint of a training, such as '
            'work_dirs/NAME/epoch_12.pth; weights of a backbone alone are for init_cfg'
        )


def work_dir_of(cfg: Config, config: str, arguments: list[str]) -> Path:
    """Where the library's tool writes."""
    for i, argument in enumerate(arguments):
        if argument.startswith('--work-dir'):
            return Path(argument.partition('=')[2] or ''.join(arguments[i + 1 : i + 2]))
    return Path(cfg.get('work_dir') or Path('work_dirs', Path(config.rpartition('::')[2]).stem))


def check_latest(work_dir: Path, arguments: list[str]) -> None:
    """Check that the checkpoint which ``--resume`` would take is whole.

    MMEngine removes old checkpoints before it writes a new one, so that a process which is killed
    while it writes leaves a part of a file, and a record of one that is gone.

    Raises:
        ValueError: It is not; the message names the latest one that is.
    """
    record = work_dir / 'last_checkpoint'
    after = arguments[arguments.index('--resume') + 1 :]
    if not record.exists() or (after and after[0].endswith('.pth')):
        return
    named = record.read_text().strip()
    if named and is_whole(Path(named)):
        return
    problem = f'{record} is empty'  # the process was killed while it wrote this
    if named:
        problem = (
            f'{named}, the last checkpoint, is {"damaged" if Path(named).exists() else "gone"}'
        )
    whole = [f for kind in ('iter', 'epoch') for f in work_dir.glob(f'{kind}_*.pth') if is_whole(f)]
    if not whole:
        raise ValueError(f'{problem}, and {work_dir} has no other')
    latest = max(whole, key=lambda f: f.stat().st_mtime)
    raise ValueError(
        f'{problem}; the latest checkpoint that is whole is {latest}: instead of --resume, give '
        f'--cfg-options load_from={latest} resume=True'
    )


def is_whole(file: Path) -> bool:
    """Whether torch wrote a file, or DeepSpeed a folder, to its end."""
    return file.is_dir() or (file.is_file() and zipfile.is_zipfile(file))


def given_config(arguments: list[str]) -> str | None:
    """The first argument that names a config file."""
    return next((a for a in arguments if a.endswith(CONFIG_SUFFIXES)), None)


def no_config(argument: str) -> str:
    """Say why an argument is no config file."""
    if Path(argument).is_dir():
        return f'no config file {argument}: this is a folder; give a file in it'
    return f'no config file {argument}; their names end in {", ".join(CONFIG_SUFFIXES)}'
