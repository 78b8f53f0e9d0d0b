"""Draw the picture of the README: one photograph, and the tokens that our methods make of it."""

import argparse
import logging
import tempfile
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

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
SIZE = 512  # side of a panel, in pixels
INPUT = 256  # side of the image that the small networks see
STRIDE = 16  # of a token without reduction, in pixels of a panel; PSViT begins with 8
MERGE_BLOCKS = (1, 3, 5)
BORDER = 0.55  # brightness of the pixels at the border of a token
GAP, TITLE, COLUMNS = 12, 40, 3


def main() -> None:
    args = parse_args()
    warnings.filterwarnings('ignore')
    logging.disable(logging.WARNING)
    from skimage.data import astronaut

    photograph = astronaut()
    assert photograph.shape == (SIZE, SIZE, 3)
    panels = [
        ('photograph', photograph),
        panel('STViT-R', photograph, windows(7 * STRIDE, 3), grid(STRIDE)),
        panel('STViT', photograph, grid(4 * STRIDE), grid(STRIDE)),
        panel('MSViT', photograph, chosen(photograph, *args.msvit), grid(STRIDE)),
        panel('MPM', photograph, merged(photograph, *args.vit), grid(STRIDE)),
        panel('PSViT, last stage', photograph, grid(32), grid(8)),
    ]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    sheet(panels).quantize(255, dither=Image.Dither.NONE).save(args.out, optimize=True)
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


def chosen(photograph: np.ndarray, config: str, checkpoint: str) -> np.ndarray:
    """The token of each pixel in a trained MSViT."""
    from mmtoken.analysis.configs import load_config
    from mmtoken.analysis.recording import load_model, record_batch

    cfg = load_config(config)
    (decision,) = record_batch(load_model(cfg, checkpoint), load(photograph, cfg)).decisions
    tokens = np.arange(SIZE) * decision.grid[0] // SIZE  # of each row of pixels, and column
    regions = tokens // decision.region_size
    sides = np.array(decision.granularities)[decision.choice[0].numpy()]
    side = sides[np.ix_(regions, regions)]  # (H, W)
    return number(side, tokens[:, None] // side, tokens // side)


def merged(photograph: np.ndarray, config: str, checkpoint: str) -> np.ndarray:
    """The token of each pixel in a MergeViT with the weights of a trained ViT."""
    import torch

    from mmtoken.analysis.configs import load_config
    from mmtoken.analysis.recording import load_model
    from mmtoken.backbones import MergeViT

    class Watched(MergeViT):
        def restore(self, index, tokens, layout):
            self.layout = layout
            return super().restore(index, tokens, layout)

    cfg = load_config(config)
    vit = cfg.model.backbone
    backbone = Watched(
        vit.arch.to_dict(), patch_size=vit.fine_size, img_size=vit.img_size, cls_token=False,
        merge_blocks=MERGE_BLOCKS,
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint, prefix='backbone.'),
    )  # fmt: skip
    backbone.init_weights()
    preprocessor = load_model(cfg, checkpoint).data_preprocessor
    with torch.no_grad():
        backbone.eval()(preprocessor(load(photograph, cfg))['inputs'])
    rows = np.arange(SIZE) * backbone.layout.grid[0] // SIZE
    return number(backbone.layout.owner[0].view(backbone.layout.grid).numpy()[np.ix_(rows, rows)])


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


def grid(side: int) -> np.ndarray:
    """The token of each pixel in a grid of squares."""
    cell = np.arange(SIZE) // side
    return number(np.zeros((SIZE, SIZE), int), cell[:, None], cell)


def windows(side: int, tokens: int) -> np.ndarray:
    """The token of each pixel where windows are pooled to ``tokens`` x ``tokens`` each."""
    cell = np.arange(SIZE) // side * tokens + np.arange(SIZE) % side * tokens // side
    return number(np.zeros((SIZE, SIZE), int), cell[:, None], cell)


def number(*parts: np.ndarray) -> np.ndarray:
    """Numbers from 0 for what differs in any part, ``(H, W)``."""
    code = np.zeros((SIZE, SIZE), int)
    for part in parts:
        code = code * SIZE + part
    return np.unique(code, return_inverse=True)[1].reshape(SIZE, SIZE)


def panel(
    title: str, photograph: np.ndarray, token: np.ndarray, dense: np.ndarray
) -> tuple[str, np.ndarray]:
    """Paint each token in the mean color of its pixels; add to the title how many of how many."""
    flat = token.ravel()
    counts = np.bincount(flat)
    means = [np.bincount(flat, channel.ravel()) / counts for channel in photograph.T.swapaxes(1, 2)]
    painted = np.stack(means, -1)[token]
    border = np.zeros(token.shape, bool)
    border[1:] |= token[1:] != token[:-1]
    border[:, 1:] |= token[:, 1:] != token[:, :-1]
    painted[border] *= BORDER
    return f'{title}: {len(counts)} of {dense.max() + 1} tokens', painted.astype(np.uint8)


def sheet(panels: list[tuple[str, np.ndarray]]) -> Image.Image:
    """All panels with their titles, in rows of COLUMNS."""
    rows = -(-len(panels) // COLUMNS)
    size = COLUMNS * (SIZE + GAP) - GAP, rows * (SIZE + TITLE + GAP) - GAP
    picture = Image.new('RGB', size, 'white')
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(26)
    for i, (title, pixels) in enumerate(panels):
        x, y = i % COLUMNS * (SIZE + GAP), i // COLUMNS * (SIZE + TITLE + GAP)
        draw.text((x, y + 2), title, 'black', font)
        picture.paste(Image.fromarray(pixels), (x, y + TITLE))
    return picture


if __name__ == '__main__':
    main()
