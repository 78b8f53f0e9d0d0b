"""Pictures of tokens: an image, and beside it what a network makes of it."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from torch import nn

from ..analysis.decisions import (
    image_ratios,
    mean_density,
    ratio_unit,
    split_stages,
    stride_of,
    token_owners,
)
from ..analysis.recording import backbone_macs, record_batch, to_picture
from ..runtime.budget import set_budget
from ..runtime.decisions import Record, RoutingDecision, TokenGroups, record_tokens

COLORS = 'viridis'
OVERLAY = 0.7  # opacity of the colors over the picture
BLACK = 0.35  # brightness of black in the picture below them, where white is 1
SCALE_WIDTH = 1.2  # of the color scale and its labels, in inches
MAX_COLUMNS = 4
PANEL_AREA = 16.0  # in square inches
BORDER = dict(color='black', alpha=0.45)
BORDER_WIDTH = 0.06  # over the side of a place
MAX_BORDER = 0.8  # in points
INCH = 72  # in points
LINE = 0.2  # height of a line of a title, in inches
LEGEND = dict(
    tokens='Each token is painted in the mean color of its pixels.',
    cells='Each cell of a token is painted in the mean color of its pixels; lines part tokens.',
    stages='Mean over the blocks of a stage; at 1, the finest, every token is a query.',
)


class Panel(NamedTuple):
    """A part of a figure.

    Attributes:
        title: Above it.
        draw: Draws it.
        legend: What its colors mean, a key of ``LEGEND``; None for a picture.
    """

    title: str
    draw: Callable[[Axes], object]
    legend: str | None = None


def draw_image(
    model: nn.Module, batch: Mapping, per_block: bool = False
) -> tuple[Figure, list[Record]]:
    """Run backbone and neck on one image, and draw its tokens and what they cost.

    Args:
        model: A detector, segmentor or classifier, in eval mode.
        batch: Of one image, from a dataloader or
            :func:`~mmtoken.analysis.recording.load_image`.
        per_block: See :func:`draw_tokens`.

    Returns:
        The figure, and what was recorded.

    Raises:
        ValueError: Nothing in the model makes tokens of its own.
    """
    picture, size, records, macs = record_image(model, batch)
    title = f'{model_name(model)}: {macs:.3g} G multiply-accumulates in backbone and neck'
    return draw_tokens(picture, records, size, per_block, title), records


def draw_budgets(
    model: nn.Module, batch: Mapping, budgets: Sequence[float]
) -> tuple[Figure, list[list[Record]]]:
    """Draw the tokens of one image under several budgets, see :func:`~mmtoken.set_budget`.

    Args:
        model: A detector, segmentor or classifier, in eval mode, that chooses its tokens. It keeps
            the last budget.
        batch: Of one image.
        budgets: Shares of tokens.

    Returns:
        The figure, and what was recorded under each budget.

    Raises:
        ValueError: The model chooses nothing, or cannot have so few tokens.
    """
    panels, records, averaged = [], [], []
    for tokens in budgets:
        set_budget(model, tokens)
        picture, size, recorded, macs = record_image(model, batch)
        budget = f'budget {tokens:.2g}, {macs:.3g} G MACs'
        found, blocks = token_panels(picture, recorded, size)
        panels += [panel._replace(title=f'{budget}\n{panel.title}') for panel in found]
        averaged += blocks
        records.append(recorded)
    columns = MAX_COLUMNS if len(panels) == len(budgets) else len(panels) // len(budgets)
    title = f'{model_name(model)}: one network, {len(budgets)} budgets'
    return draw_panels(panels, size, columns, title, averaged), records


def record_image(
    model: nn.Module, batch: Mapping
) -> tuple[np.ndarray, Sequence[int], list[Record], float]:
    """Run backbone and neck on one image.

    Returns:
        The image with its padding, ``(H, W, 3)``, uint8; its height and width without; what was
        recorded; and the cost, in G multiply-accumulates.

    Raises:
        ValueError: Nothing in the model makes tokens of its own.
    """
    images, _, records, sizes = record_batch(model, batch, record_tokens)
    if not records:
        raise ValueError('no part of the model reduces, chooses or structures its tokens')
    picture = to_picture(images[0], model.data_preprocessor)
    size = picture.shape[:2] if sizes is None else sizes[0].tolist()
    return picture, size, records, backbone_macs(model, images) / 1e9


def draw_tokens(
    picture: np.ndarray,
    records: Sequence[Record],
    size: Sequence[int] | None = None,
    per_block: bool = False,
    title: str = '',
) -> Figure:
    """An image, and beside it a panel for each set of tokens that a network makes of it.

    A token is painted in the mean color of its pixels. A network whose blocks choose each for
    themselves (DGE) has a panel for each stage instead: the queries per token of each region, the
    mean over blocks.

    Args:
        picture: Input of the network, padding included, ``(H, W, 3)``, uint8.
        records: Of this image alone, from :func:`~mmtoken.runtime.decisions.record_tokens`.
        size: Height and width without padding, in pixels, which is all that is drawn; by default
            all of the picture.
        per_block: A panel for each block in place of those of stages.
        title: Above all panels.
    """
    size = picture.shape[:2] if size is None else tuple(size)
    panels, averaged = token_panels(picture, records, size, per_block)
    panels = [Panel('input', lambda ax: ax.imshow(picture)), *panels]
    return draw_panels(panels, size, title=title, averaged=averaged)


def token_panels(
    picture: np.ndarray, records: Iterable[Record], size: Sequence[int], per_block: bool = False
) -> tuple[list[Panel], list[RoutingDecision]]:
    """The panels of :func:`draw_tokens` without the input, and blocks whose means they show."""
    groups, stages = split_records(records, per_block)
    panels = [tokens_panel(picture, each, size) for each in distinct(groups)]
    panels += [_stage_panel(picture, i, blocks) for i, blocks in enumerate(stages, start=1)]
    return panels, [block for stage in stages for block in stage]


def model_name(model: nn.Module) -> str:
    """The class of the backbone, or of a model without one."""
    return type(getattr(model, 'backbone', model)).__name__


def split_records(
    records: Iterable[Record], per_block: bool = False
) -> tuple[list[TokenGroups], list[list[RoutingDecision]]]:
    """What is painted token by token, and the blocks of stages that are drawn as a mean.

    Blocks that share one choice with all others of their stage need no mean.

    Args:
        records: From :func:`~mmtoken.runtime.decisions.record_tokens`.
        per_block: Paint the tokens of all blocks instead.
    """
    groups, blocks = [], []
    for record in records:
        if isinstance(record, TokenGroups):
            groups.append(record)
        elif record.per_network:
            groups.append(TokenGroups('chosen scales', token_owners(record)))
        else:
            blocks.append(record)
    stages = split_stages(blocks)
    shared = all(block.choice.equal(stage[0].choice) for stage in stages for block in stage)
    if not per_block and not shared:
        return groups, stages
    for i, stage in enumerate(stages, start=1):
        for j, block in enumerate(stage if per_block else stage[:1], start=1):
            name = f'queries of stage {i}' + f', block {j}' * per_block
            groups.append(TokenGroups(name, token_owners(block)))
    return groups, []


def distinct(groups: Iterable[TokenGroups]) -> list[TokenGroups]:
    """Leave repetitions out, and number what has the same name."""
    kept: list[TokenGroups] = []
    for each in groups:
        if not any(each.name == k.name and each.owner.equal(k.owner) for k in kept):
            kept.append(each)
    times, seen = Counter(each.name for each in kept), Counter()
    for i, each in enumerate(kept):
        seen[each.name] += 1
        if times[each.name] > 1:
            kept[i] = each._replace(name=f'{each.name}, {seen[each.name]}')
    return kept


def tokens_panel(
    picture: np.ndarray, groups: TokenGroups, size: Sequence[int], title: str | None = None
) -> Panel:
    """A panel with painted tokens, and their number in its title.

    Args:
        picture: Padding included, ``(H, W, 3)``, uint8.
        groups: Of this image alone.
        size: Height and width without padding, in pixels.
        title: By default the name of the groups.
    """
    owner = groups.owner[0].cpu().numpy()
    stride = stride_of(picture.shape[:2], owner.shape)
    seen = owner[: -(-size[0] // stride), : -(-size[1] // stride)]
    counted = str(len(np.unique(seen))) + f' of {seen.size}' * groups.complete + ' tokens'
    title = f'{groups.name}\n{counted}' if title is None else f'{title}: {counted}'
    colors = paint(picture, owner, stride, groups.cells)
    draw = partial(_draw_tokens, colors=colors, owner=owner, stride=stride)
    return Panel(title, draw, 'tokens' if groups.cells == 1 else 'cells')


def paint(picture: np.ndarray, owner: np.ndarray, stride: int, cells: int = 1) -> np.ndarray:
    """The mean color of each token, or of each cell of a token, on the grid of places.

    Args:
        picture: ``(H, W, 3)``, uint8.
        owner: The token of each place, ``(rows, columns)``.
        stride: Side of a place, in pixels.
        cells: Along a side of a token. With more than 1 each place has its own token.

    Returns:
        ``(rows * cells, columns * cells, 3)``, uint8.
    """
    rows, columns = (side * cells for side in owner.shape)
    side = stride // cells
    bottom, right = rows * side - picture.shape[0], columns * side - picture.shape[1]
    pixels = np.pad(picture, [(0, bottom), (0, right), (0, 0)], mode='edge')
    means = pixels.reshape(rows, side, columns, side, 3).mean(axis=(1, 3))
    if cells == 1:
        _, token = np.unique(owner, return_inverse=True)
        token = token.ravel()
        sums = [np.bincount(token, channel) for channel in means.reshape(-1, 3).T]
        means = (np.stack(sums, -1) / np.bincount(token)[:, None])[token].reshape(means.shape)
    return means.round().astype(np.uint8)


def borders(owner: np.ndarray) -> np.ndarray:
    """Lines between places of different tokens.

    Args:
        owner: The token of each place, ``(rows, columns)``.

    Returns:
        Line segments from ``(x, y)`` to ``(x, y)``, in places: ``(S, 2, 2)``.
    """
    y, x = (owner[1:] != owner[:-1]).nonzero()
    across = np.stack([np.stack([x, y + 1], -1), np.stack([x + 1, y + 1], -1)], axis=1)
    y, x = (owner[:, 1:] != owner[:, :-1]).nonzero()
    down = np.stack([np.stack([x + 1, y], -1), np.stack([x + 1, y + 1], -1)], axis=1)
    return np.concatenate([across, down])


def draw_panels(
    panels: Sequence[Panel],
    size: Sequence[int],
    columns: int = MAX_COLUMNS,
    title: str = '',
    averaged: Sequence[RoutingDecision] = (),
) -> Figure:
    """Panels in rows, and under them what their colors mean.

    Args:
        panels: Which draw in pixels of an image.
        size: Height and width of the image, in pixels.
        columns: At most.
        title: Above all panels.
        averaged: Blocks whose means are drawn, in the colors of a scale.
    """
    height, width = size
    rows = math.ceil(len(panels) / columns)
    columns = math.ceil(len(panels) / rows)
    side = math.sqrt(PANEL_AREA / (height * width))  # of a pixel, in inches
    above = LINE * (1 + max(panel.title.count('\n') for panel in panels)) + 0.1
    figure = Figure(
        figsize=(columns * (width * side + 0.1), rows * (height * side + above) + 0.6),
        layout='constrained',
    )
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax in axes:
        ax.axis('off')
    for ax, panel in zip(axes, panels, strict=False):
        panel.draw(ax)
        ax.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5), aspect='equal')
        ax.set_title(panel.title, loc='left', fontsize='medium')
    figure.get_layout_engine().set(w_pad=0.06, h_pad=0.06)
    figure.suptitle(title, fontsize='large')
    used = dict.fromkeys(panel.legend for panel in panels if panel.legend)
    figure.supxlabel('  '.join(LEGEND[name] for name in used), fontsize='small', color='0.35')
    if averaged:
        figure.set_figwidth(figure.get_figwidth() + SCALE_WIDTH)
        _draw_scale(figure, averaged)
    return figure


def to_pixels(figure: Figure, dpi: int = 100) -> np.ndarray:
    """A figure as an RGB image: ``(H, W, 3)``, uint8."""
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _draw_tokens(ax: Axes, colors: np.ndarray, owner: np.ndarray, stride: int) -> None:
    rows, columns = owner.shape
    extent = (-0.5, columns * stride - 0.5, rows * stride - 0.5, -0.5)
    ax.imshow(colors, extent=extent, interpolation='nearest')
    place = ax.get_window_extent().width / ax.figure.dpi * INCH / columns
    width = min(MAX_BORDER, place * BORDER_WIDTH)
    ax.add_collection(LineCollection(borders(owner) * stride - 0.5, lw=width, **BORDER))


def _stage_panel(picture: np.ndarray, index: int, blocks: list[RoutingDecision]) -> Panel:
    stride = stride_of(picture.shape[:2], blocks[0].grid)
    ratio = image_ratios(blocks)[0].item()
    title = f'stage {index}, stride {stride}\n{ratio:.2f} queries per token'
    return Panel(title, partial(_draw_density, picture=picture, blocks=blocks), 'stages')


def _draw_density(ax: Axes, picture: np.ndarray, blocks: list[RoutingDecision]) -> None:
    gray = picture.mean(axis=-1) / 255 * (1 - BLACK) + BLACK
    ax.imshow(gray, cmap='gray', vmin=0, vmax=1)
    density = mean_density(blocks, 0).numpy()
    side = blocks[0].region_size * stride_of(picture.shape[:2], blocks[0].grid)
    ax.imshow(
        density, cmap=COLORS, norm=_norm(blocks), alpha=OVERLAY,
        extent=(-0.5, density.shape[1] * side - 0.5, density.shape[0] * side - 0.5, -0.5),
        interpolation='nearest',
    )  # fmt: skip


def _draw_scale(figure: Figure, decisions: Sequence[RoutingDecision]) -> None:
    sides = sorted({side for decision in decisions for side in decision.granularities})
    mappable = ScalarMappable(_norm(decisions), COLORS)
    label = ratio_unit(decisions)
    bar = figure.colorbar(mappable, ax=figure.axes, alpha=OVERLAY, label=label, aspect=40)
    bar.set_ticks([1 / side**2 for side in sides], minor=False)
    bar.set_ticks([], minor=True)
    bar.set_ticklabels([f'1/{side**2}' if side > 1 else '1' for side in sides])


def _norm(decisions: Sequence[RoutingDecision]) -> LogNorm:
    """The same scale for all images and stages, from the coarsest granularity to the finest."""
    coarsest = max(max(decision.granularities) for decision in decisions)
    return LogNorm(1 / max(coarsest, 2) ** 2, 1, clip=True)
