"""Draw the picture of the README: one photograph, and the tokens that our methods make of it."""

import argparse
import logging
import tempfile
import warnings
from pathlib import Path

import numpy as np
from PIL import Image

DESCRIPTION = """\
Draw a photograph, and beside it the tokens of several methods: each token is painted in the mean
color of its pixels, with a border.

MSViT is a trained network, and MPM has the weights of a trained ViT: give the config and the
checkpoint of each. The tokens of STViT-R, STViT and PSViT depend on the size of the image alone.

The photograph is one that scikit-image ships: Eileen Collins, by NASA, public domain.
"""
EXAMPLES = """\
example, after the trainings that docs/methods.md lists:
  python tools/docs/token_picture.py --msvit CONFIG CHECKPOINT --vit CONFIG CHECKPOINT \\
      --out docs/images/tokens.png
"""
INPUT = 256  # side of the image that the small networks see
MERGE_BLOCKS = (1, 3, 5)
COLUMNS, DPI = 3, 130
# Small networks of the usual strides, with random weights: their tokens do not depend on them.
SWIN = dict(embed_dims=8, depths=(1, 1, 6), num_heads=(1, 1, 1))
VIT = dict(embed_dims=8, num_layers=6, num_heads=1, feedforward_channels=8)
STAGES = dict(stages=[(8, 1, (1,))] * 3)
STVIT_R = dict(type='mmtoken.STViTRSwin', arch=SWIN, out_indices=(0, 1, 2))
STVIT = dict(type='mmtoken.STViTDeiT', arch=VIT)
PSVIT = dict(type='mmtoken.PSViT', arch=STAGES)


def main() -> None:
    args = parse_args()
    warnings.filterwarnings('ignore')
    logging.disable(logging.WARNING)
    from skimage.data import astronaut

    from mmtoken.visualization.token_maps import Panel, draw_panels, to_pixels, tokens_panel

    photograph = astronaut()
    size = photograph.shape[:2]
    groups = {
        'STViT-R': tokens_of(STVIT_R, photograph)[0],
        'STViT': tokens_of(STVIT, photograph)[0],
        'MSViT': chosen(photograph, *args.msvit),
        'MPM': merged(photograph, *args.vit),
        'PSViT, last stage': tokens_of(PSVIT, photograph)[-1],
    }
    panels = [tokens_panel(photograph, each, size, title) for title, each in groups.items()]
    panels = [Panel('photograph', lambda ax: ax.imshow(photograph)), *panels]
    picture = Image.fromarray(to_pixels(draw_panels(panels, size, COLUMNS), DPI))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    picture.quantize(255, dither=Image.Dither.NONE).save(args.out, optimize=True)
    print(f'{args.out}: {args.out.stat().st_size / 1e3:.0f} kB')


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    for name in ('msvit', 'vit'):
        parser.add_argument(f'--{name}', nargs=2, required=True, metavar=('CONFIG', 'CHECKPOINT'))
    parser.add_argument('--out', type=Path, required=True, metavar='FILE', help='the picture, PNG')
    return parser.parse_args()


def tokens_of(backbone: dict, photograph: np.ndarray) -> list:
    """The records of a backbone whose tokens depend on the size of the image alone."""
    import torch
    from mmengine.registry import MODELS

    from mmtoken.runtime.decisions import record_tokens

    images = torch.from_numpy(photograph).permute(2, 0, 1)[None] / 255
    with torch.no_grad(), record_tokens() as records:
        MODELS.build(backbone).eval()(images)
    return records


def chosen(photograph: np.ndarray, config: str, checkpoint: str):
    """The tokens of a trained MSViT."""
    from mmtoken.analysis.configs import load_config
    from mmtoken.analysis.recording import load_model, record_batch
    from mmtoken.visualization.token_maps import split_records

    cfg = load_config(config)
    decisions = record_batch(load_model(cfg, checkpoint), load(photograph, cfg)).decisions
    return split_records(decisions)[0][0]


def merged(photograph: np.ndarray, config: str, checkpoint: str):
    """The tokens behind the last merge of a MergeViT with the weights of a trained ViT."""
    from mmtoken.analysis.configs import load_config
    from mmtoken.analysis.recording import load_model, record_batch
    from mmtoken.runtime.decisions import record_tokens

    cfg = load_config(config)
    vit = cfg.model.backbone
    cfg.model.backbone = dict(
        type='mmtoken.MergeViT', arch=vit.arch.to_dict(), patch_size=vit.fine_size,
        img_size=vit.img_size, out_indices=vit.out_indices, cls_token=False,
        merge_blocks=MERGE_BLOCKS,
    )  # fmt: skip
    model = load_model(cfg, checkpoint)
    return record_batch(model, load(photograph, cfg), record_tokens).decisions[-1]


def load(photograph: np.ndarray, cfg) -> dict:
    """A batch of the photograph, INPUT pixels wide, by the test pipeline of a config."""
    from mmtoken.analysis.recording import image_pipeline, load_image

    for step in cfg.test_dataloader.dataset.pipeline:
        if step.type == 'Resize':
            step.scale = (INPUT, INPUT)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'photograph.png'
        Image.fromarray(photograph).save(path)
        return load_image(image_pipeline(cfg), path)


if __name__ == '__main__':
    main()
