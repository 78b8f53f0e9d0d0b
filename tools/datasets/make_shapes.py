"""Command line of Shapes, a small synthetic data set; see ``README.md`` in this folder."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from shapes import CLASS_IDS, check_arguments, make_dataset
from shapes.difficulty import MAX_COLOUR_ACCURACY, MIN_OVERLAPPED_SHARE, MIN_SMALL_SHARE


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and keeps the line breaks of the description and the examples."""


def main() -> int:
    """Make the data set; return 0, or 1 if it was not made."""
    parser = _make_parser()
    args = parser.parse_args()
    size = tuple(args.size)
    try:
        check_arguments(args.train, args.val, size, args.seed, args.workers)
    except ValueError as error:
        parser.error(str(error))
    try:
        summary = make_dataset(
            args.out, args.train, args.val, size, args.seed, args.workers, args.force, True
        )
    except OSError as error:
        print(f'make_shapes: {error}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f'make_shapes: interrupted; {args.out} is as it was', file=sys.stderr)
        return 1
    _print_summary(summary, args.out)
    return 0


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=(
            'Draw a small data set of eight object classes on a wall, and write it twice: in the\n'
            'folder layout of COCO 2017 (boxes, masks) and in that of ADE20K (semantic masks).\n'
            'The same options give the same bytes.'
        ),
        epilog=(
            'examples:\n'
            '  python tools/datasets/make_shapes.py\n'
            '  python tools/datasets/make_shapes.py --out data/tiny --train 16 --val 8\n'
            '  python tools/datasets/make_shapes.py --seed 1 --force\n\n'
            'OUT/preview.png shows some scenes, OUT/shapes.json holds counts and difficulty.'
        ),
        formatter_class=_HelpFormatter,
    )
    parser.add_argument('--out', type=Path, default=Path('data/shapes'), help='folder to make')
    parser.add_argument('--train', type=int, default=600, help='number of training images')
    parser.add_argument('--val', type=int, default=150, help='number of validation images')
    parser.add_argument(
        '--size',
        type=int,
        nargs=2,
        metavar=('H', 'W'),
        default=[128, 176],
        help='height and width in pixels, exchanged in about half the images',
    )
    parser.add_argument('--seed', type=int, default=0, help='of the data set')
    parser.add_argument(
        '--workers',
        type=int,
        default=os.cpu_count() or 1,
        help='parallel processes; their number does not change the result',
    )
    parser.add_argument(
        '--force',
        action='store_true',
        help='replace OUT if this tool made it',
    )
    return parser


def _print_summary(summary: dict[str, Any], out: Path) -> None:
    console = Console()
    counts = Table(title='Instances')
    for column in ('class', 'ADE20K id', 'train', 'val'):
        counts.add_column(column, justify='left' if column == 'class' else 'right')
    train, val = summary['instances']['train'], summary['instances']['val']
    for name in train:
        counts.add_row(name, str(CLASS_IDS.get(name, '')), str(train[name]), str(val[name]))
    console.print(counts)

    difficulty = Table(title='Difficulty')
    for column in ('measure', 'value', 'held'):
        difficulty.add_column(column, justify='left' if column == 'measure' else 'right')
    for key, label, bound in (
        ('small', 'instances under 16 px', f'>= {MIN_SMALL_SHARE:.0%}'),
        ('overlapped', 'overlapped instances', f'>= {MIN_OVERLAPPED_SHARE:.0%}'),
        ('colour_accuracy', 'accuracy of mean colour', f'< {MAX_COLOUR_ACCURACY:.0%}'),
        ('large', 'instances of 32 px and more', ''),
    ):
        difficulty.add_row(label, f'{summary["difficulty"][key]:.1%}', bound)
    console.print(difficulty)
    console.print(f'Wrote {out}; see {out / "preview.png"}')


if __name__ == '__main__':
    sys.exit(main())
