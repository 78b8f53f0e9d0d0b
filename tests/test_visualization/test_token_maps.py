import io

import numpy as np
import torch

from mmtoken.runtime.decisions import RoutingDecision
from mmtoken.visualization.token_maps import (
    cell_borders,
    draw_blocks,
    draw_stages,
    draw_tokens,
)

PICTURE = np.zeros((32, 40, 3), np.uint8)


def decide(grid, region_columns, choice, padding=None):
    shape = (2, -(-grid[0] // 4), region_columns)
    choice = torch.full(shape, choice)
    return RoutingDecision(choice, (1, 2, 4), 4, grid, padding)


def test_borders_of_cells():
    decision = RoutingDecision(torch.tensor([[[1, 0]]]), (1, 2, 4), 4, (3, 6), None)
    halves = {tuple(map(tuple, line)) for line in cell_borders(decision, 0, 1).tolist()}
    assert halves == {
        ((0, 0), (4, 0)), ((0, 2), (4, 2)), ((0, 3), (4, 3)),
        ((0, 0), (0, 3)), ((2, 0), (2, 3)), ((4, 0), (4, 3)),
    }  # fmt: skip
    ones = cell_borders(decision, 0, 0)
    assert ones[..., 0].min() == 4 and ones[..., 0].max() == 6
    assert len(cell_borders(decision, 0, 2)) == 0


def test_panels_of_stages_and_blocks():
    padding = torch.zeros(2, 2, 3, dtype=torch.bool)
    padding[1, :, 2] = True
    fine = decide((8, 10), 3, 0, padding)
    coarse = decide((4, 5), 2, 2)
    for draw, number in ((draw_stages, 2), (draw_blocks, 3)):
        figure = draw(PICTURE, [fine, fine, coarse], image=1)
        titles = [ax.get_title() for ax in figure.axes]
        assert titles[0] == 'input' and sum('queries per token' in t for t in titles) == number
        assert '1.00' in titles[1] and '0.10' in titles[number]
        figure.savefig(io.BytesIO(), format='png', dpi=40)
    labels = [text.get_text() for text in figure.axes[-1].get_yticklabels()]
    assert labels == ['1', '1/4', '1/16']


def test_tokens_of_a_network_that_chooses_once():
    choice = torch.tensor([[[1] * 5] * 4, [[0, 0, 0, 1, 1]] * 4])
    figure = draw_tokens(PICTURE, RoutingDecision(choice, (1, 2), 2, (8, 10), None, True), image=1)
    panel, bar = figure.axes[1:]
    assert panel.get_title() == 'coarse 0.40, 70 % of the tokens'
    assert bar.get_ylabel() == 'tokens per fine patch'
    coarse, fine = (len(lines.get_segments()) for lines in panel.collections[1:])
    assert (coarse, fine) == (8 * 4, 12 * 6)  # a square each, or a square and a cross
    figure.savefig(io.BytesIO(), format='png', dpi=40)


def pixels(figure):
    figure.set_dpi(40)
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())


def test_colours_are_the_same_in_every_picture():
    """A uniform map has the colour of its granularity, not the middle of a scale of its own."""
    fine, coarse = (pixels(draw_stages(PICTURE, [decide((8, 10), 3, c)])) for c in (0, 2))
    assert fine.shape == coarse.shape and (fine != coarse).any()
