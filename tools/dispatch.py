"""Run a stock tool of mmdet, mmseg or mmpretrain on a config, by its ``default_scope``."""

import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

LIBRARIES = ('mmdet', 'mmseg', 'mmpretrain')
USAGE = """\
usage: python tools/{tool}.py CONFIG {arguments}[options]

Runs the {tool}.py of mmdet, mmseg or mmpretrain, whichever the config's `default_scope` names.
All arguments are passed on as they are. The usual options:

  --work-dir DIR           where logs and checkpoints go (default: work_dirs/NAME_OF_CONFIG)
{options}  --cfg-options KEY=VALUE  override settings of the config
  --launcher pytorch       set by tools/dist_{tool}.sh; `slurm` by tools/slurm_{tool}.sh

For the complete list of a library's own options: python tools/{tool}.py CONFIG --help
"""
ARGUMENTS = dict(train='', test='CHECKPOINT ')
OPTIONS = dict(
    train="""\
  --amp                    mixed precision (needs a GPU)
  --resume                 go on from the latest checkpoint in the work dir
  --auto-scale-lr          scale the learning rate to the batch size (mmdet, mmpretrain)
""",
    test="""\
  --show-dir DIR           draw the predictions
  --out FILE               keep the predictions
  --tta                    test-time augmentation
""",
)


def main(tool: str) -> None:
    """Run ``tool`` ('train' or 'test') with this process's arguments."""
    config = find_config(sys.argv[1:])
    if config is None:
        print(USAGE.format(tool=tool, arguments=ARGUMENTS[tool], options=OPTIONS[tool]))
        sys.exit(0 if {'-h', '--help'} & set(sys.argv) else 2)
    if not Path(config).is_file():
        sys.exit(f'{tool}.py: no config file {config}')
    runpy.run_path(stock_tool(library_of(config), f'{tool}.py'), run_name='__main__')


def find_config(arguments: list[str]) -> str | None:
    """The first argument that names a config file."""
    return next((a for a in arguments if a.endswith(('.py', '.json', '.yaml', '.yml'))), None)


def library_of(config: str) -> str:
    """The library whose tools a config is written for.

    Raises:
        SystemExit: If the config does not say.
    """
    from mmengine.config import Config

    scope = Config.fromfile(config).get('default_scope')
    if scope not in LIBRARIES:
        sys.exit(f'{config}: default_scope is {scope!r}; it must be one of {", ".join(LIBRARIES)}')
    return scope


def stock_tool(library: str, name: str) -> str:
    """Path of a tool that an OpenMMLab library brings along.

    Raises:
        SystemExit: If the library or its tools are not installed.
    """
    spec = find_spec(library)
    if spec is None or spec.origin is None:
        sys.exit(f'this needs {library}, which is not installed; see the README for the set-up')
    package = Path(spec.origin).parent
    # Installed packages keep their tools in .mim, editable installs beside the package.
    for tools in (package / '.mim' / 'tools', package.parent / 'tools'):
        if (tools / name).is_file():
            return str(tools / name)
    sys.exit(f'{library} is installed in {package}, but without its tools/{name}')
