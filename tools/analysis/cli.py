"""What the analysis tools share: arguments, errors, the file for results."""

import argparse
import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Any


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and keeps the line breaks of the description and the examples."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False, []):
            return action.help
        return super()._get_help_string(action)


def make_parser(description: str, examples: str) -> argparse.ArgumentParser:
    """A parser with the arguments that all analysis tools take."""
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
    parser.add_argument('--json', type=Path, metavar='FILE', help='write the figures here as well')
    return parser


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


def fail(error: Any) -> int:
    """Say in one line what went wrong; return the exit status."""
    print(f'{Path(sys.argv[0]).stem}: {error}', file=sys.stderr)
    return 1


def quieten() -> None:
    """Keep the libraries' warnings and logs off the screen."""
    warnings.filterwarnings('ignore')
    logging.disable(logging.WARNING)


def write_json(path: Path | None, results: dict) -> None:
    """Write results for other programs, if a file is asked for."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=2) + '\n')
