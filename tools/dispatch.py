"""Run a config with the tool of the library it is written for: mmdet, mmseg or mmpretrain."""

import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

CONFIG_SUFFIXES = ('.py', '.json', '.yaml', '.yml')
USAGE = """\
usage: mmtoken {tool} CONFIG {arguments}[options]

Runs the {tool}.py of mmdet, mmseg or mmpretrain, according to the config's `default_scope` or the
class of its model. All arguments are passed on unchanged. The usual options:

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
    config = find_config(arguments)
    if config is None:
        wanted = {'-h', '--help'} & set(arguments)
        if arguments and not wanted and not arguments[0].startswith('-'):
            sys.exit(f'{tool}.py: {no_config(arguments[0])}')
        print(USAGE.format(tool=tool, arguments=ARGUMENTS[tool], options=OPTIONS[tool]))
        sys.exit(0 if wanted else 2)
    # Importing mmtoken first lets configs inherit from mmtoken:: configs.
    from mmtoken.library import library_of, read_config

    try:
        cfg = read_config(config)
        library = library_of(cfg)
        if tool == 'test' and 'backbone' in cfg.get('model', {}):
            check_checkpoint(arguments[arguments.index(config) + 1 :])
    except (OSError, ValueError) as error:
        sys.exit(f'{tool}.py: {error}')
    runpy.run_path(stock_tool(library, f'{tool}.py'), run_name='__main__')


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


def find_config(arguments: list[str]) -> str | None:
    """The first argument that names a config file."""
    return next((a for a in arguments if a.endswith(CONFIG_SUFFIXES)), None)


def no_config(argument: str) -> str:
    """Say why an argument is no config file."""
    if Path(argument).is_dir():
        return f'no config file {argument}: this is a folder; give a file in it'
    return f'no config file {argument}; their names end in {", ".join(CONFIG_SUFFIXES)}'


def stock_tool(library: str, name: str) -> str:
    """Path of a tool of an OpenMMLab library.

    Raises:
        SystemExit: If the library or its tools are not installed.
    """
    spec = find_spec(library)
    if spec is None or spec.origin is None:
        sys.exit(
            f'this needs {library}, which is not installed; see the README for the installation'
        )
    package = Path(spec.origin).parent
    # Installed packages keep their tools in .mim, editable installs beside the package.
    for tools in (package / '.mim' / 'tools', package.parent / 'tools'):
        if (tools / name).is_file():
            return str(tools / name)
    sys.exit(f'{library} is installed in {package}, but without its tools/{name}')
