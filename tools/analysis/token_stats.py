"""Count the queries that a trained network spends on objects and on background."""

import argparse
import sys
from pathlib import Path

from cli import HelpFormatter, fail, quieten, write_json
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table

DESCRIPTION = """\
Run a trained network with routers over its validation set and count queries per token in each
stage, on objects and on background; for a network that chooses once, before its first block
(MSViT), tokens per fine patch. A second table shows the share of regions of the coarsest
granularity, and how it differs between images: if it hardly does, routers choose by position and
not by content.

A region is on an object if at least half of its pixels are; otherwise it is background. Coarse
stages have large regions, in which small objects count as background. Objects are the instances
of mmdet, by masks if the test pipeline loads them, else by boxes; for mmseg, all labels but those
given with --background. Regions that a border cuts off count in `all` only. Padding is not counted.

For all stages together, `objects / background` compares within stages, since the share of objects
differs between stages.
"""
EXAMPLES = """\
examples:
  mmtoken stats DETECTOR_CFG work_dirs/NAME/epoch_12.pth
  mmtoken stats SEGMENTER_CFG CKPT --background 0 --json stats.json
  mmtoken stats MSVIT_CFG work_dirs/NAME/epoch_12.pth --json gates.json
"""


def main() -> int:
    """Count, print a table; return 0, or 1 if something is missing."""
    args = parse_args()
    if not args.checkpoint.is_file():
        return fail(f'no checkpoint {args.checkpoint}')
    quieten()
    from mmtoken.analysis.configs import load_config
    from mmtoken.analysis.recording import check_channels, load_model, record_batch, val_dataloader
    from mmtoken.analysis.token_stats import annotated, collect

    try:
        cfg = load_config(args.config)
        loader = val_dataloader(cfg)
    except (OSError, ValueError) as error:
        return fail(error)
    if cfg.default_scope == 'mmseg' and not args.background:
        classes = loader.dataset.metainfo['classes']
        some = ', '.join(f'{i} {name}' for i, name in enumerate(classes[:5]))
        return fail(f'--background says which classes are no objects; there are {some}, ...')
    try:
        model = load_model(cfg, args.checkpoint, args.device)
    except (OSError, ValueError) as error:
        return fail(error)
    console = Console(stderr=True)

    def batches():
        for batch in track(loader, 'running', console=console, transient=True):
            check_channels(cfg, batch)
            recorded = record_batch(model, batch)
            yield recorded, *annotated(recorded, args.background)

    try:
        stats = collect(batches())
    except ValueError as error:
        return fail(error)
    report(stats)
    write_json(args.json, dict(config=Path(args.config).name, background=args.background) | stats)
    return 0


def parse_args():
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EXAMPLES, formatter_class=HelpFormatter
    )
    parser.add_argument('config', metavar='CFG', help='config of mmdet or mmseg')
    parser.add_argument('checkpoint', type=Path, metavar='CKPT', help='trained with this config')
    parser.add_argument(
        '--background', type=int, nargs='+', default=[], metavar='N',
        help='labels that are no objects, for mmseg (0 for the embedded data set)',
    )  # fmt: skip
    parser.add_argument('--device', default='cpu', help='where to run')
    parser.add_argument('--json', type=Path, metavar='FILE', help='write the results here as well')
    return parser.parse_args()


def report(stats: dict) -> None:
    """Print the tables of queries per token and of the share of coarse regions."""
    stages, images = stats['stages'], stats['images']
    rows = [(str(i), stage) for i, stage in enumerate(stages, start=1)]
    if len(stages) > 1:
        rows.append(('all', stats['overall']))
    keys = {'query_ratio': 'all', 'objects': 'on objects', 'background': 'on background'}
    unit = stats['unit'].capitalize()
    queries = {**keys, 'contrast': 'objects / background'}
    _print_table(f'{unit}, images: {images}', queries, rows, stats['per_image'])
    coarse = [(name, row | row['coarse_ratio']) for name, row in rows]
    keys = {'all': 'all', 'objects': 'on objects', 'background': 'on background'}
    title = 'Share of regions of the coarsest granularity'
    _print_table(title, keys, coarse, stats['per_image']['coarse_ratio'])


def _print_table(title: str, keys: dict[str, str], rows: list[tuple], spread: dict) -> None:
    """Print a row for each stage, a column for each of ``keys``, and the spread over images."""
    table = Table(title=title, box=SIMPLE_HEAD, pad_edge=False)
    table.add_column('stage')
    for column in ('stride', *keys.values()):
        table.add_column(column, justify='right')
    for name, row in rows:
        if name == 'all':
            table.add_section()
        ratios = (row[key] for key in keys)
        table.add_row(
            name, str(row.get('stride', '')), *('' if r is None else f'{r:.3f}' for r in ratios),
            style='bold' if name == 'all' else None,
        )  # fmt: skip
    console = Console()
    console.print(table)
    std = '' if spread['std'] is None else f' ± {spread["std"]:.3f}'
    console.print(
        f'By image: {spread["mean"]:.3f}{std}, from {spread["min"]:.3f} to {spread["max"]:.3f}.'
    )


if __name__ == '__main__':
    sys.exit(main())
