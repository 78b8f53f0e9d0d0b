"""Put a sparse backbone in the place of the dense one of a config and its checkpoint."""

import argparse
import sys
from contextlib import nullcontext
from pathlib import Path
from statistics import median

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

DESCRIPTION = """\
Turn a config of mmdet, mmseg or mmpretrain with a Swin, PVT or plain ViT (DeiT, MAE, DINOv2) into
one with a sparse backbone of the same channels and strides, and its checkpoint into one that fits.
Neck, heads, data and schedule stay: the new config has the old one as its base.

  stvit-r  Swin: semantic tokens, recovered by attention
  stvit    plain ViT: the same
  dge      PVT and plain ViT: in every block regions choose how many queries they have
  msvit    plain ViT: regions choose one coarse token or several fine ones, once
  merge    plain ViT: tokens that are alike merge; needs no training

All but merge have parts that start fresh and must be trained: with the schedule of the base, or
with --finetune, a short one in which the dense network teaches the sparse one.
"""
EXAMPLES = """\
examples:
  mmtoken sparsify mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py mask-rcnn_swin-t.pth \\
      --method stvit-r --out-dir sparse
  mmtoken sparsify my_vit_config.py work_dirs/my_vit_config/iter_80000.pth \\
      --method msvit --finetune 8000 --out-dir sparse
  mmtoken sparsify my_vit_config.py vit.pth --method merge --training-free --out-dir sparse
"""
TARGET = 0.5  # of the losses that train routers and gates, by default
ROUNDS = 3


def main() -> int:
    """Write config and checkpoint, print what changed; return 0, or 1 if it cannot be done."""
    args = parse_args()
    import torch  # after the arguments are known to be good

    from mmtoken.analysis.configs import default_shape
    from mmtoken.conversion import TRAINING_FREE, sparsify

    torch.set_num_threads(1)
    try:
        if args.training_free and args.method not in TRAINING_FREE:
            raise ValueError(
                f'{args.method} must be trained; without training there is '
                f'{", ".join(TRAINING_FREE)}'
            )
        result = sparsify(args.config, args.method, args.out_dir, args.checkpoint, args.finetune)
        shape = tuple(args.shape or default_shape(result.base))
    except (OSError, ValueError) as error:
        print(f'sparsify: {error}', file=sys.stderr)
        return 1
    for note in result.notes:
        print(f'note: {note}')
    if result.report is not None:
        print(result.report)
    Console().print(compare(result.backbone, shape, args.time))
    print(f'Wrote {" and ".join(map(str, filter(None, (result.config, result.checkpoint))))}')
    return 0


def parse_args() -> argparse.Namespace:
    from mmtoken.conversion.methods import METHODS

    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument('config', metavar='CFG', help='a path, or LIBRARY::PATH')
    parser.add_argument('checkpoint', nargs='?', metavar='CKPT', help='of the dense model')
    parser.add_argument('--method', required=True, choices=list(METHODS))
    parser.add_argument('--out-dir', required=True, type=Path, metavar='DIR', help='for the files')
    parser.add_argument(
        '--training-free', action='store_true', help='refuse methods that must be trained'
    )
    parser.add_argument(
        '--finetune',
        type=int,
        metavar='N',
        help='write a schedule of N epochs, or iterations where CFG counts these',
    )
    parser.add_argument(
        '--shape',
        type=int,
        nargs=2,
        metavar=('H', 'W'),
        help='of the image that is counted (default: the test size of CFG)',
    )
    parser.add_argument(
        '--time', action='store_true', help='measure milliseconds, on one CPU thread'
    )
    args = parser.parse_intermixed_args()  # CKPT may follow options
    if args.finetune is not None and args.finetune < 1:
        parser.error(f'--finetune must be 1 or more, got {args.finetune}')
    return args


def compare(backbone: dict, shape: tuple[int, int], timed: bool) -> Table:
    """Cost of the dense and the sparse backbone for one image."""
    import torch

    from mmtoken import dense_twin, routing_override
    from mmtoken.analysis.cost import measure_cost
    from mmtoken.analysis.timing import time_in_turn
    from mmtoken.registry import MODELS

    sparse = {key: value for key, value in backbone.items() if key != 'init_cfg'}
    dense = dense_twin(dict(model=dict(backbone=sparse)))['model']['backbone']
    ratio = getattr(MODELS.get(sparse['type']), 'ratio_name', None)
    images = torch.rand(1, sparse.get('in_channels', 3), *shape)
    costs, runs = {}, {}
    for name, cfg in (('dense', dense), ('sparse', sparse)):
        network = MODELS.build(dict(cfg)).eval()
        chooses = name == 'sparse' and ratio

        def context(chooses=chooses):
            return routing_override(**{ratio: TARGET}) if chooses else nullcontext()

        def run(network=network, context=context):
            with torch.no_grad(), context():
                network(images)

        with torch.no_grad():
            costs[name] = measure_cost(network, images, context=context)
        runs[name] = run
    times = time_in_turn(runs, ROUNDS, images.device) if timed else {}
    assumed = f', {ratio.replace("_", " ")} {TARGET}' if ratio else ''
    table = Table(title=f'Backbone, {shape[0]} x {shape[1]} pixels{assumed}', box=SIMPLE_HEAD)
    table.add_column('')
    for column in ('M parameters', 'G MACs', *['ms'] * timed):
        table.add_column(column, justify='right')
    for name, cost in costs.items():
        ms = [f'{median(times[name]):.0f}'] if timed else []
        table.add_row(name, f'{cost.parameters / 1e6:.2f}', f'{cost.macs / 1e9:.1f}', *ms)
    return table


if __name__ == '__main__':
    sys.exit(main())
