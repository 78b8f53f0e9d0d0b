"""Export a config's network to ONNX or a program of torch.export, and check the file."""

import argparse
import sys
from functools import partial
from pathlib import Path
from statistics import median

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

DESCRIPTION = """\
Export backbone and neck of a config, or a whole segmentor up to its scores, and check the file: its
outputs must equal PyTorch's to 0.001 of their largest value. Time is printed beside PyTorch's, on
one CPU thread.

Height and width are fixed, the batch size too, unless --dynamic-batch. The file of a network that
chooses its tokens (DGE, MSViT, MPM) chooses them for each image, as PyTorch does, and takes one
image at a time. Input is what the data preprocessor of the model makes of images: normalized,
float32, (B, C, H, W).

Needs torch 2.6 or later; ONNX also the extra `export`: pip install onnx onnxscript onnxruntime
"""
EXAMPLES = """\
examples:
  mmtoken export configs/stvit_r/mask-rcnn_stvit-r-swin-t_fpn_8xb2-1x_coco.py epoch_12.pth \\
      --format onnx --out stvit-r.onnx
  mmtoken export CFG CKPT --format torch-export --out network.pt2 --shape 512 512 --dynamic-batch
  mmtoken export SEGMENTOR_CFG CKPT --format onnx --part model --image photo.jpg --out model.onnx
  mmtoken export MSVIT_CFG CKPT --format onnx --tokens 0.4 --out msvit.onnx
"""
ROUNDS = 5


def main() -> int:
    """Export, check, print; return 0, or 1 if it cannot be done."""
    args = parse_args()
    try:
        report(*run(args))
    except (OSError, ValueError, ImportError) as error:
        print(f'export: {args.config}: {error}', file=sys.stderr)
        return 1
    return 0


def parse_args() -> argparse.Namespace:
    from mmtoken.export import SUFFIXES

    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument('config', metavar='CFG', help='config of mmdet, mmseg or mmpretrain')
    parser.add_argument(
        'checkpoint', nargs='?', metavar='CKPT', help='of a training; without, weights are random'
    )
    parser.add_argument('--format', required=True, choices=list(SUFFIXES), help='of the file')
    parser.add_argument('--out', required=True, type=Path, metavar='FILE', help='to write')
    parser.add_argument(
        '--part',
        choices=('neck', 'model'),
        default='neck',
        help='up to the neck, or a whole segmentor (default: neck)',
    )
    parser.add_argument(
        '--shape',
        type=int,
        nargs=2,
        metavar=('H', 'W'),
        help='of the images, in pixels (default: the test size of CFG)',
    )
    parser.add_argument('--batch-size', type=int, default=1, metavar='N', help='default: 1')
    parser.add_argument('--dynamic-batch', action='store_true', help='leave the batch size open')
    parser.add_argument(
        '--tokens',
        type=float,
        metavar='SHARE',
        help='share of tokens that all images get (mmtoken.set_budget), for networks that choose '
        'them (default: what CFG says)',
    )
    parser.add_argument(
        '--image',
        type=Path,
        metavar='FILE',
        help="photograph to check with, by the config's test pipeline, whose size is taken "
        '(default: noise)',
    )
    parser.add_argument('--force', action='store_true', help='overwrite FILE')
    return parser.parse_intermixed_args()


def run(args: argparse.Namespace) -> tuple:
    """Write and check the file; return what :func:`report` prints.

    Raises:
        OSError, ValueError, ImportError: It cannot be done; nothing is left behind.
    """
    import torch

    from mmtoken.analysis.configs import load_config
    from mmtoken.analysis.recording import load_model
    from mmtoken.analysis.timing import time_in_turn
    from mmtoken.export import check_exportable, check_torch, compare, export, load
    from mmtoken.files import replacing
    from mmtoken.runtime.budget import set_budget

    check_torch()
    if args.out.exists() and not args.force:
        raise FileExistsError(f'{args.out} exists; --force overwrites it')
    torch.set_num_threads(1)
    cfg = load_config(args.config)
    if args.part == 'model' and cfg.default_scope != 'mmseg':
        raise ValueError(
            f'--part model is for segmentors of mmseg, not for {cfg.model.type} of '
            f'{cfg.default_scope}, whose boxes its own tools make'
        )
    model = load_model(cfg, args.checkpoint)
    check_exportable(model, args.batch_size == 1 and not args.dynamic_batch)
    if args.tokens is not None:
        set_budget(model, args.tokens)
    network = wrap(model, args.part)
    images = make_images(cfg, model, args)
    with replacing(args.out) as new:
        export(network, images, new, args.format, args.dynamic_batch)
        exported = load(new, args.format)
        checks = compare(exported, network, images)
        if args.dynamic_batch:
            compare(exported, network, torch.cat([images, images[:1]]))
        runs = dict(exported=partial(exported, images), network=partial(network, images))
        with torch.no_grad():
            times = time_in_turn(runs, ROUNDS, images.device)
    return args, checks, {name: median(ms) for name, ms in times.items()}


def wrap(model, part: str):
    """The part of a model that is exported, in eval mode."""
    from mmtoken.export import FeatureExtractor, Segmentor

    return (Segmentor if part == 'model' else FeatureExtractor)(model).eval()


def make_images(cfg, model, args: argparse.Namespace):
    """What the network is exported and checked with: a photograph or noise, ``(B, C, H, W)``."""
    import torch

    from mmtoken.analysis.configs import default_shape, image_channels
    from mmtoken.analysis.recording import image_pipeline, load_image

    if args.image is None:
        shape = args.shape or default_shape(cfg)
        return torch.randn(args.batch_size, image_channels(cfg.model), *shape)
    if args.shape or args.batch_size > 1:
        raise ValueError('--image has its own size, and is one: leave out --shape and --batch-size')
    batch = model.data_preprocessor(load_image(image_pipeline(cfg), args.image), False)
    return batch['inputs']


def report(args: argparse.Namespace, checks: list, times: dict[str, float]) -> None:
    """Print a table of outputs, and times."""
    table = Table(title=f'{args.out}, {args.out.stat().st_size / 1e6:.1f} MB', box=SIMPLE_HEAD)
    table.add_column('output')
    table.add_column('largest difference', justify='right')
    for check in checks:
        table.add_row(' x '.join(map(str, check.shape)), f'{check.error:.0e}')
    console = Console()
    console.print(table)
    console.print(f'{times["exported"]:.0f} ms, PyTorch {times["network"]:.0f} ms', highlight=False)


if __name__ == '__main__':
    sys.exit(main())
