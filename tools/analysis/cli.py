"""Arguments, messages and result files of the analysis tools."""

import argparse
import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and keeps the line breaks of the description and the examples."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False, []):
            return action.help
        return super()._get_help_string(action)


class StoreRatio(argparse.Action):
    """Stores ratios, and in ``ratio_name`` the name that ``--query-ratio`` and the like give."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        if namespace.ratio is not None:
            parser.error('give one ratio: networks take one kind')
        namespace.ratio = values if len(values) > 1 else values[0]
        name = option_string.removeprefix('--').replace('-', '_')
        namespace.ratio_name = None if name == 'ratio' else name


def make_parser(description: str, examples: str) -> argparse.ArgumentParser:
    """A parser with the arguments of ``flops.py`` and ``benchmark.py``."""
    parser = argparse.ArgumentParser(
        description=description, epilog=examples, formatter_class=HelpFormatter
    )
    parser.add_argument('config', metavar='CFG', help='config of mmdet, mmseg or mmpretrain')
    parser.add_argument(
        '--shape',
        type=positive,
        nargs=2,
        metavar=('H', 'W'),
        help="height and width of the image (default: the config's test size, or 800 1280 for "
        'mmdet, 512 512 for mmseg, 224 224 for mmpretrain)',
    )
    parser.add_argument(
        '--part',
        choices=('backbone', 'model'),
        default='backbone',
        help='the backbone alone, or the model up to the raw outputs of its heads',
    )
    parser.add_argument(
        '--ratio', '--query-ratio', '--coarse-ratio',
        action=StoreRatio,
        type=float,
        nargs='+',
        metavar='R',
        help='draw random token layouts with this ratio, for networks with routers: queries over '
        'tokens for DGE (query ratio, 0 < R <= 1), coarse regions over regions for MSViT (coarse '
        'ratio, 0 <= R <= 1). Several ratios are given to the images of a batch in turn, as in '
        '--ratio 0.2 0.4 0.6 0.8. Without it the untrained routers choose, nearly always the '
        'finest granularity',
    )  # fmt: skip
    parser.set_defaults(ratio_name=None)
    parser.add_argument('--json', type=Path, metavar='FILE', help='write the results here as well')
    return parser


def num_ratios(ratio: float | list[float] | None) -> int:
    """Images that get a ratio each; 1 without ratios."""
    return len(ratio) if isinstance(ratio, list) else 1


def routing_words(routing: dict[str, float | list[float] | None]) -> list[str]:
    """``['coarse ratio 0.5']``, or for several ``['coarse ratio .2/.4']``, as in titles."""
    words = []
    for name, given in routing.items():
        if isinstance(given, list) and len(given) > 1:
            given = '/'.join(f'{ratio:g}'.removeprefix('0') or '0' for ratio in given)
        elif isinstance(given, list):
            (given,) = given
        if given is not None:
            words.append(f'{name.replace("_", " ")} {given}')
    return words


def routing_line(routing: dict, measured: dict[str, float]) -> str | None:
    """One line on the token layouts; None for a network without routers.

    Args:
        routing: The override, if any.
        measured: Ratios by name, from :func:`mmtoken.analysis.decisions.measured_ratios`.
    """
    if not measured:
        return None
    ratios = ', '.join(f'{name.replace("_", " ")} {value:.3f}' for name, value in measured.items())
    if routing:
        return f'Random token layouts: {ratios}.'
    return f'Token layouts of the untrained routers: {ratios}. Give a --ratio for others.'


def positive(text: str) -> int:
    """A whole number from 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f'must be 1 or more, got {number}')
    return number


def figure(number: float) -> str:
    """A number with about three digits, without an exponent."""
    decimals = 0 if abs(number) >= 100 else 1 if abs(number) >= 10 else 2
    return f'{number:.{decimals}f}'


def progress_bar() -> Progress:
    """A progress bar on stderr that disappears at the end."""
    columns = (
        TextColumn('{task.description}'), BarColumn(), TextColumn('{task.percentage:3.0f}%'),
        TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    return Progress(*columns, console=Console(stderr=True), transient=True)


def fail(error: Any) -> int:
    """Print an error in one line; return the exit status."""
    print(f'{Path(sys.argv[0]).stem}: {" ".join(str(error).split())}', file=sys.stderr)
    return 1


def quieten() -> None:
    """Hide the libraries' warnings and logs."""
    warnings.filterwarnings('ignore')
    logging.disable(logging.WARNING)


def write_json(path: Path | None, results: dict) -> None:
    """Write results to a file, if one is given."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=2) + '\n')
