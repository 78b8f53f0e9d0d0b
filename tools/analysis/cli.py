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
    ratio = parser.add_mutually_exclusive_group()
    ratio.add_argument(
        '--query-ratio',
        type=float,
        metavar='R',
        help='queries over tokens, in (0, 1], in a random layout, where regions choose their '
        'granularity (DGE); without it the untrained routers choose, nearly always the finest',
    )
    ratio.add_argument(
        '--coarse-ratio',
        type=float,
        nargs='+',
        metavar='R',
        help='coarse regions over regions, in [0, 1], in a random layout, where regions are one '
        'coarse token or several fine ones (MSViT); several numbers go to the images of a batch '
        'in turn, as in --coarse-ratio 0.2 0.4 0.6 0.8',
    )
    parser.add_argument('--json', type=Path, metavar='FILE', help='write the figures here as well')
    return parser


def routing_of(args: argparse.Namespace) -> dict[str, float | list[float]]:
    """What to override routers with: the one kind of ratio that is given, if any."""
    ratios = dict(query_ratio=args.query_ratio, coarse_ratio=args.coarse_ratio)
    return {name: ratio for name, ratio in ratios.items() if ratio is not None}


def routing_words(routing: dict[str, float | list[float] | None]) -> list[str]:
    """``['coarse ratio 0.5']``, or of several ``['coarse ratio .2/.4']``, as in titles."""
    words = []
    for name, given in routing.items():
        if isinstance(given, list) and len(given) > 1:
            given = '/'.join(f'{ratio:g}'.removeprefix('0') or '0' for ratio in given)
        elif isinstance(given, list):
            (given,) = given
        if given is not None:
            words.append(f'{name.replace("_", " ")} {given}')
    return words


def routing_line(routing: dict, query_ratio: float | None, coarse_ratio: float) -> str | None:
    """Say who chose the tokens; None of a network that does not choose.

    Args:
        routing: From :func:`routing_of`.
        query_ratio: Queries over tokens, as measured; for MSViT, tokens over fine ones.
        coarse_ratio: Regions that are as coarse as can be over regions, likewise.
    """
    if query_ratio is None:
        return None
    if 'coarse_ratio' in routing:
        return (
            f'Regions choose at random: {coarse_ratio:.3f} of them coarse, '
            f'{query_ratio:.3f} tokens per fine patch.'
        )
    if routing:
        return f'Regions choose at random: {query_ratio:.3f} queries per token.'
    return (
        f'The untrained routers chose {query_ratio:.3f} of the tokens there can be '
        f'({coarse_ratio:.3f} of the regions coarsest); give a --query-ratio (DGE) or '
        "--coarse-ratio (MSViT) for a trained one's."
    )


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
    print(f'{Path(sys.argv[0]).stem}: {" ".join(str(error).split())}', file=sys.stderr)
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
