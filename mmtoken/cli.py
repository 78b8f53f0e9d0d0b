"""The command ``mmtoken``: the tools of this project by a verb, wherever it is installed."""

import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from .version import __version__

TOOLS = Path(__file__).parent / '.mim' / 'tools'
# verb -> script and what it does
VERBS = {
    'train': ('train.py', 'train a detector, segmentor or classifier'),
    'test': ('test.py', 'evaluate a checkpoint'),
    'convert': ('convert_checkpoint.py', "turn another project's checkpoint into one of ours"),
    'sparsify': ('misc/sparsify.py', 'put a sparse backbone into a config and its checkpoint'),
    'export': ('misc/export.py', 'write a network as ONNX or torch.export, and check it'),
    'flops': ('analysis/flops.py', 'count multiply-accumulates and parameters'),
    'benchmark': ('analysis/benchmark.py', 'time a network beside its dense twin'),
    'compare': ('analysis/compare.py', 'compare trainings: scores, MACs and times of several runs'),
    'maps': ('analysis/token_maps.py', 'draw the tokens of a network over images'),
    'stats': ('analysis/token_stats.py', 'count the tokens of a network over a data set'),
    'gpu-report': ('analysis/gpu_report.py', 'measure all backbones on one device'),
    'env': ('misc/collect_env.py', 'describe the installation, for a bug report'),
}
USAGE = """\
usage: mmtoken VERB [ARGUMENTS]

Token-sparsified vision transformers for MMDetection, MMSegmentation and MMPreTrain.

{verbs}

`mmtoken VERB --help` explains a verb. `mmtoken --version` prints {version}.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool of a verb.

    Args:
        arguments: The verb, then those of its tool; by default those of this process.

    Returns:
        0, or 2 if there is no such verb. A tool ends with its own code.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    verb = arguments[0] if arguments else ''
    if verb in VERBS:
        run(verb, arguments[1:])
        return 0
    if verb == '--version':
        print(__version__)
        return 0
    if verb in ('-h', '--help'):
        print(usage())
        return 0
    print(usage(), file=sys.stderr)
    if verb:
        print(f'mmtoken: no verb {verb!r}; there are {", ".join(VERBS)}', file=sys.stderr)
    return 2


def usage() -> str:
    """What ``mmtoken --help`` prints."""
    width = max(map(len, VERBS))
    verbs = '\n'.join(f'  {verb:{width}}  {words}' for verb, (_, words) in VERBS.items())
    return USAGE.format(verbs=verbs, version=__version__)


def run(verb: str, arguments: Sequence[str]) -> None:
    """Run a tool as if it had been called by its path.

    Raises:
        SystemExit: The tools are not there, or the tool ends so.
    """
    script = TOOLS / VERBS[verb][0]
    if not script.is_file():
        raise SystemExit(
            f'mmtoken: {script} is missing. In a checkout without symbolic links, run: '
            'pip install --no-build-isolation -e .'
        )
    sys.argv = [f'mmtoken {verb}', *arguments]  # which --help shows; runpy would put the path there
    sys.path.insert(0, str(script.parent))
    sys.modules['__main__'] = module = ModuleType('__main__')
    module.__file__ = str(script)
    exec(compile(script.read_bytes(), script, 'exec'), module.__dict__)
