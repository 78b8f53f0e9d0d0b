"""Turn a checkpoint of another project into one of ours."""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import mmtoken
from mmtoken.checkpoints import (
    Report,
    convert,
    detect_source,
    find_weights,
    fit_to,
    read_checkpoint,
)
from mmtoken.checkpoints.convert import keep_outside
from mmtoken.checkpoints.sources import SOURCES
from mmtoken.files import replacing


def main() -> int:
    """Convert the file; return 0, or 1 if it was not converted."""
    args = _make_parser().parse_args()
    try:
        if args.dst.exists() and not args.force:
            raise FileExistsError(f'{args.dst} exists; --force overwrites it')
        state, report = _convert(args)
        _write(state, report, args)
    except (OSError, ValueError) as error:
        print(f'convert_checkpoint: {error}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f'convert_checkpoint: interrupted; {args.dst} is as it was', file=sys.stderr)
        return 1
    print(report)
    print(f'Wrote {args.dst}')
    return 0


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=(
            'Turn a checkpoint of another project into one of ours: names and layout become those\n'
            'of our backbones. The optimizer is left out, and so are heads and necks, unless\n'
            '--whole keeps them. With --config the weights are also fitted to a backbone (patch\n'
            'embeddings and bias tables resized, projections split, layer scale folded where the\n'
            'backbone has none), and what does not fit is an error.\n\n'
            'Backbones convert by themselves when they load a file (init_cfg or load_from); use\n'
            'this tool to inspect a file or to save the result. No code in a file is executed.'
        ),
        epilog=(
            'sources:\n'
            '  stvit-r  released STViT-R on Swin: classifiers and detectors\n'
            '  swin     Swin Transformer: Microsoft, mmdet/mmseg/mmpretrain, timm\n'
            '  swat     SWAT on Swin and DeiT, by the released code\n'
            '  vtpack   DGE on DeiT and PVT, and deformable PVT, by the released code\n'
            '  pvt      PVT: released classifiers and detectors, mmdet\n'
            '  dinov2   DINOv2, with or without registers: Meta, timm, mmpretrain\n'
            '  deit     DeiT, distilled or not: Facebook, timm, mmpretrain\n'
            '  vit      ViT: timm, mmpretrain, mmseg; MAE: Facebook, mmpretrain\n\n'
            'example:\n'
            '  mmtoken convert swin_small_patch4_window7_224.pth \\\n'
            '      checkpoints/swin-s.pth --source swin\n'
            '  mmtoken convert deit_small_patch16_224.pth deit-s.pth \\\n'
            '      --config configs/stvit_deit/mask-rcnn_stvit-deit-s_sfp_8xb2-1x_coco.py\n\n'
            "then, in a config: init_cfg=dict(type='Pretrained', "
            "checkpoint='checkpoints/swin-s.pth')"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('src', metavar='SRC', help='path or URL of the checkpoint')
    parser.add_argument('dst', metavar='DST', type=Path, help='file to write')
    parser.add_argument(
        '--source', choices=list(SOURCES), help='origin of SRC (default: detected from the names)'
    )
    parser.add_argument('--config', metavar='CFG', help="fit the weights to this config's backbone")
    parser.add_argument(
        '--prefix',
        metavar='P',
        help="prefix of the backbone's names in SRC (default: 'backbone.' if that occurs)",
    )
    parser.add_argument(
        '--whole',
        action='store_true',
        help='keep necks and heads too, with their names, for load_from',
    )
    parser.add_argument('--force', action='store_true', help='overwrite DST')
    return parser


def _convert(args: argparse.Namespace) -> tuple[dict[str, Tensor], Report]:
    weights = find_weights(read_checkpoint(args.src), args.src)
    state, report = _convert_backbone(weights, args)
    if not args.whole:
        return state, report
    state = keep_outside(state, weights, report, args.prefix)
    if not report.kept:
        raise ValueError(f'{args.src} contains only a backbone; leave out --whole')
    return state, report


def _convert_backbone(
    weights: dict[str, Tensor], args: argparse.Namespace
) -> tuple[dict[str, Tensor], Report]:
    if args.config:
        return fit_to(_build_backbone(args.config), weights, args.src, args.prefix, args.source)
    source = args.source or detect_source(weights, args.prefix)
    if source is None:
        raise ValueError(
            f'{args.src}: its names are not those of {", ".join(SOURCES)}; if it is one of these, '
            "give the prefix of the backbone's names with --prefix"
        )
    try:
        return convert(weights, source, args.prefix)
    except ValueError as error:
        raise ValueError(f'{args.src}: {error}') from error


def _build_backbone(path: str) -> nn.Module:
    """The backbone of a config on the meta device: only names and shapes are needed."""
    from mmtoken.analysis.twin import our_class
    from mmtoken.library import read_config
    from mmtoken.registry import MODELS

    try:
        model = read_config(path).get('model')
        backbone = dict(model.get('backbone', model) if model else {})
        if our_class(backbone) is not None:
            backbone.pop('init_cfg', None)
            with torch.device('meta'):
                return MODELS.build(backbone)
    except OSError:
        raise
    except Exception as error:  # configs are programs
        raise ValueError(f'{path} gives no backbone: {error}') from error
    raise ValueError(
        f'{path} has no backbone of ours, whose type is mmtoken.NAME or its class; it has '
        f'{backbone.get("type")}'
    )


def _write(state: dict[str, Tensor], report: Report, args: argparse.Namespace) -> None:
    meta = dict(
        source=report.source,
        layout=report.layout,
        file=args.src.rpartition('/')[2],
        mmtoken_version=mmtoken.__version__,
    )
    # Tensors of a file may be views of larger ones, which torch.save would store with them.
    content = dict(state_dict={name: tensor.clone() for name, tensor in state.items()}, meta=meta)
    with replacing(args.dst) as temporary:
        torch.save(content, temporary)


if __name__ == '__main__':
    sys.exit(main())
