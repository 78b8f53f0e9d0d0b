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

DGE and MSViT choose by the image: give a config and a checkpoint of each, trained with that config.
The tokens of STViT-R, STViT and PSViT depend on the size of the image alone.

The photograph is one that scikit-image ships: Eileen Collins, by NASA, public domain.
"""
EXAMPLES = """\
examples, after the trainings that docs/methods.md lists:
  python tools/docs/token_picture.py --dge CONFIG CHECKPOINT --msvit CONFIG CHECKPOINT \\
      --out docs/images/tokens.png
"""
SIZE = 512  # side of a panel, in pixels
INPUT = 256  # side of the image that the small networks see
STRIDE = 16  # of a token of STViT-R and STViT
BORDER = 0.55  # brightness of the pixels at the border of a token
GAP, TITLE, COLUMNS = 12, 40, 3


def main() -> None:
    args = parse_args()
    warnings.filterwarnings('ignore')
    logging.disable(logging.WARNING)
    from skimage.data import astronaut

    photograph = astronaut()
    assert photograph.shape == (SIZE, SIZE, 3)
    gate, *_ = decide(photograph, *args.msvit)
    routers = decide(photograph, *args.dge)
    block = routers[args.block]
    panels = [
        ('photograph', photograph),
        panel('STViT-R: 3×3 a window', photograph, windows(7 * STRIDE, 3)),
        panel('STViT: one of 4×4', photograph, grid(4 * STRIDE)),
        panel(f'DGE, block {args.block + 1} of {len(routers)}', photograph, chosen(block)),
        panel('MSViT', photograph, chosen(gate)),
        panel('PSViT, last stage', photograph, grid(32)),
    ]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    sheet(panels).quantize(255, dither=Image.Dither.NONE).save(args.out, optimize=True)
    print(f'{args.out}: {args.out.stat().st_size / 1e3:.0f} kB')


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    for name in ('dge', 'msvit'):
        parser.add_argument(f'--{name}', nargs=2, required=True, metavar=('CONFIG', 'CHECKPOINT'))
    parser.add_argument(
        '--block', type=int, default=4, metavar='N', help='which block of DGE, from 0 (default: 4)'
    )
    parser.add_argument('--out', type=Path, required=True, metavar='FILE', help='the picture, PNG')
    return parser.parse_args()


def decide(photograph: np.ndarray, config: str, checkpoint: str) -> list:
    """What a trained network chooses for the photograph, a decision for each router."""
    from mmtoken.analysis.subject import load_config
    from mmtoken.analysis.watch import image_pipeline, load_image, load_model, watch

    cfg = load_config(config)
    for step in cfg.test_dataloader.dataset.pipeline:
        if step.type == 'Resize':
            step.scale = (INPUT, INPUT)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'photograph.png'
        Image.fromarray(photograph).save(path)
        batch = load_image(image_pipeline(cfg), path)
    return watch(load_model(cfg, checkpoint), batch).decisions


def chosen(decision) -> np.ndarray:
    """The token of each pixel under a routing decision."""
    tokens = np.arange(SIZE) * decision.grid[0] // SIZE  # of each row of pixels, and column
    regions = tokens // decision.region_size
    sides = np.array(decision.granularities)[decision.choice[0].cpu().numpy()]
    side = sides[np.ix_(regions, regions)]  # (H, W)
    return number(side, tokens[:, None] // side, tokens // side)


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


def panel(title: str, photograph: np.ndarray, token: np.ndarray) -> tuple[str, np.ndarray]:
    """Paint each token in the mean color of its pixels; add their number to the title."""
    flat = token.ravel()
    counts = np.bincount(flat)
    means = [np.bincount(flat, channel.ravel()) / counts for channel in photograph.T.swapaxes(1, 2)]
    painted = np.stack(means, -1)[token]
    border = np.zeros(token.shape, bool)
    border[1:] |= token[1:] != token[:-1]
    border[:, 1:] |= token[:, 1:] != token[:, :-1]
    painted[border] *= BORDER
    return f'{title}: {len(counts)} tokens', painted.astype(np.uint8)


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
