"""Draw the granularity of a network's tokens over images."""

import argparse
import sys
from pathlib import Path

from cli import HelpFormatter, fail, quieten, write_json
from rich.console import Console
from rich.progress import track

DESCRIPTION = """\
Draw the routing decisions of a network over images: the input, and a panel for each stage with the
queries per token of each region, the mean over the blocks of the stage. At 1, the finest, every
token is a query. With --per-block there is a panel for each block, with the borders of its cells.
Padding is hatched.

A network that chooses once, before its first block (MSViT), has one panel, with the borders of its
tokens: one token per coarse region, one token per patch elsewhere.

Images go through the config's test pipeline and are drawn as the network sees them.
"""
EXAMPLES = """\
examples:
  python tools/analysis/token_maps.py CFG work_dirs/NAME/epoch_12.pth a.jpg b.jpg --out maps
  python tools/analysis/token_maps.py CFG CKPT *.jpg --out maps --per-block --json ratios.json
  python tools/analysis/token_maps.py MSVIT_CFG work_dirs/NAME/epoch_12.pth a.jpg --out maps
  python tools/analysis/token_maps.py CFG a.jpg --out maps      random weights, as a trial
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
    from mmtoken.analysis.decisions import measured_ratios, query_ratio, ratio_unit, split_stages
    from mmtoken.analysis.recording import (
        check_channels,
        image_pipeline,
        load_image,
        load_model,
        record_batch,
        to_picture,
    )
    from mmtoken.visualization.token_maps import draw_blocks, draw_stages, draw_tokens

    if checkpoint is None:
        print('No checkpoint is given: weights are random, and the pictures mean nothing.')
    try:
        cfg = load_config(args.config)
        model, pipeline = load_model(cfg, checkpoint, args.device), image_pipeline(cfg)
    except (OSError, ValueError) as bad:
        return fail(bad)
    draw = draw_blocks if args.per_block else draw_stages
    args.out.mkdir(parents=True, exist_ok=True)
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
        images, _, decisions = record_batch(model, batch)
        if not decisions:
            return fail(f'no part of the model in {args.config} chooses its tokens')
        picture = to_picture(images[0], model.data_preprocessor)
        if decisions[0].per_network:
            figure = draw_tokens(picture, *decisions)
        else:
            figure = draw(picture, decisions)
        figure.savefig(target, dpi=args.dpi)
        ratios[str(path)] = one = dict(
            measured_ratios(decisions),
            stages=[query_ratio(stage) for stage in split_stages(decisions)],
        )
        stages = ' '.join(f'{ratio:.2f}' for ratio in one['stages'])
        console.print(
            f'{target}: {one["query_ratio"]:.2f} {ratio_unit(decisions)}'
            + f' (by stage: {stages})' * (len(one['stages']) > 1)
            + f', {one["coarse_ratio"]:.2f} of the regions coarse',
            highlight=False,
            soft_wrap=True,
        )
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
        '--per-block', action='store_true', help='a panel for each block instead of each stage'
    )
    parser.add_argument('--force', action='store_true', help='overwrite existing pictures')
    parser.add_argument('--device', default='cpu', help='where to run')
    parser.add_argument('--dpi', type=int, default=150, metavar='N', help='dots per inch')
    parser.add_argument(
        '--json',
        type=Path,
        metavar='FILE',
        help='write the ratios here, by image and stage',
    )
    return parser.parse_args()


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
