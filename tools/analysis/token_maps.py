"""Draw the tokens of a network over images."""

import argparse
import sys
from pathlib import Path

from cli import HelpFormatter, fail, quieten, write_json
from rich.console import Console
from rich.progress import track

DESCRIPTION = """\
Draw what a network makes of images: the input, and beside it its tokens, each painted in the mean
color of its pixels, with their number (of that without the method). Above them are the
multiply-accumulates of backbone and neck for that very image.

  MSViT           the scales that it chooses
  DGE             for each stage the queries per token of each region, the mean over its blocks; at
                  1, the finest, every token is a query. --per-block paints the queries of blocks
  STViT-R, STViT  where semantic tokens are pooled from, and for each image token the semantic token
                  that it attends to most
  MPM             tokens after each merge; a token may stand for places that do not touch
  PSViT           tokens of each stage, and how many layers compute attention
  SWAT            the cells that tokens keep

Images go through the config's test pipeline and are drawn as the network sees them.
"""
EXAMPLES = """\
examples:
  mmtoken maps CFG work_dirs/NAME/epoch_12.pth a.jpg b.jpg --out maps
  mmtoken maps DGE_CFG CKPT *.jpg --out maps --per-block --json ratios.json
  mmtoken maps MSVIT_CFG CKPT a.jpg --out maps --budgets 0.3 0.44 0.6 1
  mmtoken maps CFG a.jpg --out maps      random weights, as a trial
"""
CHECKPOINTS = ('.pth', '.pt')


def main() -> int:
    """Draw all images; return 0, or 1 if something is missing."""
    args = parse_args()
    files = list(args.files)
    checkpoint = files.pop(0) if files[0].suffix in CHECKPOINTS else None
    pictures = [args.out / f'{path.stem}.png' for path in files]
    error = find_error(args.force, checkpoint, files, pictures)
    if error:
        return fail(error)
    quieten()
    from mmtoken.analysis.configs import load_config
    from mmtoken.analysis.recording import check_channels, image_pipeline, load_image, load_model
    from mmtoken.visualization.token_maps import draw_budgets, draw_image

    if checkpoint is None:
        print('No checkpoint is given: weights are random, and what they choose means nothing.')
    try:
        cfg = load_config(args.config)
        model, pipeline = load_model(cfg, checkpoint, args.device), image_pipeline(cfg)
    except (OSError, ValueError) as bad:
        return fail(bad)
    ratios = {}
    console = Console(stderr=True)
    for path, target in track(
        list(zip(files, pictures, strict=True)), 'drawing', console=console, transient=True
    ):
        try:
            batch = load_image(pipeline, path)
            check_channels(cfg, batch)
        except (OSError, ValueError) as bad:
            return fail(f'{path}: {bad}')
        try:
            if args.budgets:
                figure, records = draw_budgets(model, batch, args.budgets)
                measured = dict(zip(map(str, args.budgets), map(measure, records), strict=True))
                lines = [describe(f'budget {tokens}', one) for tokens, one in measured.items()]
            else:
                figure, records = draw_image(model, batch, args.per_block)
                measured = measure(records)
                lines = [describe(target, measured)]
        except ValueError as bad:
            return fail(f'{args.config}: {bad}')
        args.out.mkdir(parents=True, exist_ok=True)
        figure.savefig(target, dpi=args.dpi)
        ratios[str(path)] = measured
        for line in lines:
            console.print(line, highlight=False, soft_wrap=True)
    write_json(args.json, ratios)
    return 0


def parse_args():
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EXAMPLES, formatter_class=HelpFormatter
    )
    parser.add_argument('config', metavar='CFG', help='config of mmdet, mmseg or mmpretrain')
    parser.add_argument(
        'files', nargs='+', type=Path, metavar='[CKPT] IMAGE',
        help='a checkpoint (.pth) trained with this config, then images',
    )  # fmt: skip
    parser.add_argument('--out', type=Path, required=True, metavar='DIR', help='for the pictures')
    parser.add_argument(
        '--per-block',
        action='store_true',
        help='for DGE a panel for each block, not stage',
    )
    parser.add_argument(
        '--budgets',
        type=float,
        nargs='+',
        metavar='SHARE',
        help='draw the tokens that each of these shares leaves (mmtoken.set_budget)',
    )
    parser.add_argument('--force', action='store_true', help='overwrite existing pictures')
    parser.add_argument('--device', default='cpu', help='where to run')
    parser.add_argument('--dpi', type=int, default=150, metavar='N', help='dots per inch')
    parser.add_argument(
        '--json',
        type=Path,
        metavar='FILE',
        help='write the ratios of DGE and MSViT here, by image and stage',
    )
    return parser.parse_args()


def measure(records: list) -> dict:
    """Ratios of the routing decisions in a record, over all blocks and by stage."""
    from mmtoken.analysis.decisions import measured_ratios, query_ratio, ratio_unit, split_stages
    from mmtoken.runtime.decisions import RoutingDecision

    decisions = [record for record in records if isinstance(record, RoutingDecision)]
    if not decisions:
        return {}
    return dict(
        measured_ratios(decisions),
        unit=ratio_unit(decisions),
        stages=[query_ratio(stage) for stage in split_stages(decisions)],
    )


def describe(name: Path | str, ratios: dict) -> str:
    """One line on a picture, or on a budget in it."""
    if not ratios:
        return str(name)
    stages = ' '.join(f'{ratio:.2f}' for ratio in ratios['stages'])
    return (
        f'{name}: {ratios["query_ratio"]:.2f} {ratios["unit"]}'
        + f' (by stage: {stages})' * (len(ratios['stages']) > 1)
        + f', {ratios["coarse_ratio"]:.2f} of the regions coarse'
    )


def find_error(
    force: bool, checkpoint: Path | None, images: list[Path], pictures: list[Path]
) -> str | None:
    """The first problem with the files, if any."""
    if checkpoint is not None and not checkpoint.is_file():
        return f'no checkpoint {checkpoint}'
    if not images:
        return 'give images to draw on, after the checkpoint'
    missing = [path for path in images if not path.is_file()]
    if missing:
        return f'no image {missing[0]}'
    if len(set(pictures)) < len(pictures):
        return 'several images have the same name, and would be drawn to the same file'
    there = [path for path in pictures if path.exists()]
    if there and not force:
        return f'{there[0]} exists; --force overwrites it'
    return None


if __name__ == '__main__':
    sys.exit(main())
