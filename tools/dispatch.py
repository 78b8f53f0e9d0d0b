"""Run a config with the tool of the library it is written for: mmdet, mmseg or mmpretrain."""

import runpy
import sys
from pathlib import Path

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
    except (OSError, ValueError) as error:
        sys.exit(f'{tool}.py: {error}')
    # The libraries' tools take files only.
    sys.argv[1 + arguments.index(config)] = str(find_config(config))
    runpy.run_path(str(stock_tool), run_name='__main__')


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


def given_config(arguments: list[str]) -> str | None:
    """The first argument that names a config file."""
    return next((a for a in arguments if a.endswith(CONFIG_SUFFIXES)), None)


def no_config(argument: str) -> str:
    """Say why an argument is no config file."""
    if Path(argument).is_dir():
        return f'no config file {argument}: this is a folder; give a file in it'
    return f'no config file {argument}; their names end in {", ".join(CONFIG_SUFFIXES)}'
