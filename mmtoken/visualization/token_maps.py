"""Maps of routing decisions, drawn over the image."""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection, PatchCollection
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ..analysis.decisions import (
    image_coarse_ratios,
    image_ratios,
    mean_density,
    ratio_unit,
    real_regions,
    split_stages,
    stride_of,
)
from ..runtime.decisions import RoutingDecision

COLORS = 'viridis'
OVERLAY = 0.7  # opacity of the colors over the picture
FAINT = 0.45  # the same, under thick borders of cells
BLACK = 0.35  # brightness of black in the picture below them, where white is 1
MAX_COLUMNS = 6
PANEL_AREA = 9.0  # in square inches
THIN, THICK = 0.3, 0.8  # lines between cells, in points
MIN_CELL = 2.0  # smallest cell with a border: side on the page, in points
INCH = 72  # in points


def draw_stages(
    picture: np.ndarray, decisions: Sequence[RoutingDecision], image: int = 0
) -> Figure:
    """A panel for each stage: queries per token of each region, the mean over its blocks.

    Args:
        picture: Input of the network, padding included, ``(H, W, 3)``, uint8.
        decisions: Of all blocks in order, from
            :func:`~mmtoken.runtime.decisions.record_routing`.
        image: Index in the batch.
    """
    stages = split_stages(decisions)
    figure, axes = _make_figure(picture, 1 + len(stages))
    for i, (panel, blocks) in enumerate(zip(axes, stages, strict=True), start=1):
        stride = stride_of(picture.shape[:2], blocks[0].grid)
        _draw_density(panel, picture, blocks, image, stride)
        panel.set_title(f'stage {i}, stride {stride}\n{_ratio(blocks, image)}', fontsize='medium')
    _draw_scale(figure, axes, decisions)
    return figure


def draw_blocks(
    picture: np.ndarray, decisions: Sequence[RoutingDecision], image: int = 0
) -> Figure:
    """A panel for each block: its cells, colored by queries per token, and their borders.

    Args:
        picture, decisions, image: See :func:`draw_stages`.
    """
    figure, axes = _make_figure(picture, 1 + len(decisions))
    panels = iter(axes)
    for i, blocks in enumerate(split_stages(decisions), start=1):
        stride = stride_of(picture.shape[:2], blocks[0].grid)
        for j, decision in enumerate(blocks, start=1):
            panel = next(panels)
            _draw_density(panel, picture, [decision], image, stride)
            _draw_cells(panel, picture, decision, image, stride)
            panel.set_title(f'stage {i}, block {j}\n{_ratio([decision], image)}', fontsize='medium')
    _draw_scale(figure, axes, decisions)
    return figure


def draw_tokens(picture: np.ndarray, decision: RoutingDecision, image: int = 0) -> Figure:
    """Borders of the tokens of a network that chooses once, such as MSViT, over the image.

    Args:
        picture, image: See :func:`draw_stages`.
        decision: The only decision of the network.
    """
    figure, (panel,) = _make_figure(picture, 2)
    stride = stride_of(picture.shape[:2], decision.grid)
    _draw_density(panel, picture, [decision], image, stride, FAINT)
    _draw_cells(panel, picture, decision, image, stride, THICK)
    coarse = image_coarse_ratios([decision])[image].item()
    tokens = image_ratios([decision])[image].item()
    panel.set_title(f'coarse {coarse:.2f}, {100 * tokens:.0f} % of the tokens', fontsize='medium')
    _draw_scale(figure, [panel], [decision], FAINT)
    return figure


def to_pixels(figure: Figure) -> np.ndarray:
    """A figure as an image, ``(H, W, 3)``, RGB, uint8."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.ascontiguousarray(np.asarray(canvas.buffer_rgba())[..., :3])


def cell_borders(decision: RoutingDecision, image: int, level: int) -> np.ndarray:
    """Borders of the cells of one granularity in the regions that chose it.

    Args:
        decision: Of a block.
        image: Index in the batch.
        level: Index of the granularity.

    Returns:
        Line segments from ``(x, y)`` to ``(x, y)``, in tokens: ``(S, 2, 2)``.
    """
    size, side = decision.region_size, decision.granularities[level]
    height, width = decision.grid
    chosen = (decision.choice[image] == level) & real_regions(decision)[image].to(
        decision.choice.device
    )
    rows, columns = (index.cpu().numpy() * size for index in chosen.nonzero(as_tuple=True))
    bottoms, rights = np.minimum(rows + size, height), np.minimum(columns + size, width)
    segments = []
    for offset in range(0, size + 1, side):
        y, x = np.minimum(rows + offset, bottoms), np.minimum(columns + offset, rights)
        segments += [
            np.stack([np.stack([columns, y], -1), np.stack([rights, y], -1)], axis=1),
            np.stack([np.stack([x, rows], -1), np.stack([x, bottoms], -1)], axis=1),
        ]
    return np.concatenate(segments)


def _make_figure(picture: np.ndarray, number: int) -> tuple[Figure, list[Axes]]:
    """Panels in rows. The first shows the picture; the others are returned."""
    height, width = picture.shape[:2]
    rows = math.ceil(number / MAX_COLUMNS)
    columns = math.ceil(number / rows)
    panel = math.sqrt(PANEL_AREA * width / height), math.sqrt(PANEL_AREA * height / width)
    figure = Figure(
        figsize=(columns * panel[0] + 1.4, rows * (panel[1] + 0.6)), layout='constrained'
    )
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax in axes:
        ax.axis('off')
    axes[0].imshow(picture)
    axes[0].set_title('input', fontsize='medium')
    return figure, axes[1:number]


def _draw_density(
    ax: Axes,
    picture: np.ndarray,
    blocks: list[RoutingDecision],
    image: int,
    stride: int,
    opacity: float = OVERLAY,
) -> None:
    height, width = picture.shape[:2]
    gray = picture.mean(axis=-1) / 255 * (1 - BLACK) + BLACK
    ax.imshow(gray, cmap='gray', vmin=0, vmax=1)
    density = mean_density(blocks, image).numpy()
    padding = ~real_regions(blocks[0])[image].numpy()
    side = blocks[0].region_size * stride  # of a region, in pixels
    ax.imshow(
        np.ma.array(density, mask=padding), cmap=COLORS, norm=_norm(blocks), alpha=opacity,
        extent=(-0.5, density.shape[1] * side - 0.5, density.shape[0] * side - 0.5, -0.5),
        interpolation='nearest',
    )  # fmt: skip
    squares = [
        Rectangle((column * side - 0.5, row * side - 0.5), side, side)
        for row, column in zip(*padding.nonzero(), strict=True)
    ]
    ax.add_collection(
        PatchCollection(squares, facecolor='white', edgecolor='grey', hatch='////', linewidth=0)
    )
    ax.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))


def _draw_cells(
    ax: Axes,
    picture: np.ndarray,
    decision: RoutingDecision,
    image: int,
    stride: int,
    width: float = THIN,
) -> None:
    """Draw borders of cells, ``width`` points wide, brightest for the finest cells."""
    points_per_pixel = math.sqrt(PANEL_AREA / math.prod(picture.shape[:2])) * INCH
    for level, side in reversed(list(enumerate(decision.granularities))):
        if side * stride * points_per_pixel >= MIN_CELL:
            borders = cell_borders(decision, image, level) * stride - 0.5
            brightness = 0.8 / (level + 1)
            ax.add_collection(LineCollection(borders, color='white', lw=width, alpha=brightness))


def _draw_scale(
    figure: Figure, axes: list[Axes], decisions: Sequence[RoutingDecision], opacity: float = OVERLAY
) -> None:
    sides = sorted({side for decision in decisions for side in decision.granularities})
    mappable = ScalarMappable(_norm(decisions), COLORS)
    bar = figure.colorbar(mappable, ax=axes, alpha=opacity, label=ratio_unit(decisions), shrink=0.8)
    bar.set_ticks([1 / side**2 for side in sides], minor=False)
    bar.set_ticks([], minor=True)
    bar.set_ticklabels([f'1/{side**2}' if side > 1 else '1' for side in sides])


def _norm(decisions: Sequence[RoutingDecision]) -> LogNorm:
    """The same scale for all images and stages, from the coarsest granularity to the finest."""
    coarsest = max(max(decision.granularities) for decision in decisions)
    return LogNorm(1 / max(coarsest, 2) ** 2, 1, clip=True)


def _ratio(blocks: Sequence[RoutingDecision], image: int) -> str:
    return f'{image_ratios(blocks)[image].item():.2f} queries per token'
