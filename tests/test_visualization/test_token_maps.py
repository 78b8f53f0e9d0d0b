from contextlib import nullcontext

import numpy as np
import pytest
import torch
from families import FAMILIES
from mmengine.registry import MODELS

from mmtoken.runtime.decisions import RoutingDecision, TokenGroups, record_tokens
from mmtoken.runtime.routing_override import routing_override
from mmtoken.visualization.token_maps import (
    borders,
    distinct,
    draw_tokens,
    paint,
    split_records,
    to_pixels,
    tokens_panel,
)

PICTURE = np.random.default_rng(0).integers(0, 256, (32, 40, 3), np.uint8)
QUARTERS = np.array([[0, 0, 1, 1, 1]] * 2 + [[2, 2, 3, 3, 3]] * 2)


def decide(grid, columns, *choices, per_network=False):
    shape = (1, -(-grid[0] // 4), columns)
    return [
        RoutingDecision(torch.full(shape, choice), (1, 2, 4), 4, grid, None, per_network)
        for choice in choices
    ]


def groups(owner, name='tokens', **kwargs):
    return TokenGroups(name, torch.as_tensor(owner)[None], **kwargs)


def titles(figure):
    return [ax.get_title(loc='left') for ax in figure.axes]


def test_tokens_have_the_mean_color_of_their_pixels():
    colors = paint(PICTURE, QUARTERS, 8)
    assert colors.shape == (4, 5, 3)
    for rows, columns in ((slice(0, 2), slice(0, 2)), (slice(2, 4), slice(2, 5))):
        pixels = PICTURE[rows.start * 8 : rows.stop * 8, columns.start * 8 : columns.stop * 8]
        mean = pixels.reshape(-1, 3).mean(axis=0).round()
        assert (colors[rows, columns] == mean).all()


def test_places_of_a_token_may_lie_apart():
    checkers = np.indices((4, 5)).sum(axis=0) % 2
    assert len(np.unique(paint(PICTURE, checkers, 8).reshape(-1, 3), axis=0)) == 2


def test_cells_keep_their_own_color():
    colors = paint(PICTURE, np.arange(20).reshape(4, 5), 8, cells=4)
    assert colors.shape == (16, 20, 3)
    assert (colors[3, 5] == PICTURE[6:8, 10:12].mean(axis=(0, 1)).round()).all()


def test_incomplete_places_repeat_the_border_of_the_picture():
    colors = paint(PICTURE[:29, :33], np.arange(20).reshape(4, 5), 8)
    column = PICTURE[:8, 32].astype(float).mean(axis=0).round()
    assert (colors[0, 4] == column).all()


def test_borders_part_tokens():
    lines = {tuple(map(tuple, line)) for line in borders(QUARTERS).tolist()}
    across = {((x, 2), (x + 1, 2)) for x in range(5)}
    assert lines == across | {((2, y), (2, y + 1)) for y in range(4)}
    assert len(borders(np.zeros((4, 5)))) == 0


def test_padding_is_neither_drawn_nor_counted():
    panel = tokens_panel(PICTURE, groups(QUARTERS), size=(16, 40))
    assert panel.title == 'tokens\n2 of 10 tokens'
    figure = draw_tokens(PICTURE, [groups(QUARTERS)], size=(16, 40))
    assert all(ax.get_ylim() == (15.5, -0.5) for ax in figure.axes)
    incomplete = tokens_panel(PICTURE, groups(QUARTERS, complete=False), (32, 40))
    assert incomplete.title == 'tokens\n4 tokens'


def test_repetitions_are_drawn_once_and_others_numbered():
    other = QUARTERS[::-1].copy()
    found = distinct([groups(QUARTERS), groups(other), groups(QUARTERS), groups(other, 'others')])
    assert [each.name for each in found] == ['tokens, 1', 'tokens, 2', 'others']


def test_stages_with_different_blocks_are_a_mean():
    records = [*decide((8, 10), 3, 0, 2), *decide((4, 5), 2, 2)]
    figure = draw_tokens(PICTURE, records, title='network')
    assert titles(figure)[:3] == [
        'input',
        'stage 1, stride 4\n0.54 queries per token',
        'stage 2, stride 8\n0.10 queries per token',
    ]
    labels = [text.get_text() for text in figure.axes[-1].get_yticklabels()]
    assert labels == ['1', '1/4', '1/16'] and figure.get_suptitle() == 'network'


def test_stages_with_one_choice_and_blocks_are_painted():
    shared = [*decide((8, 10), 3, 1, 1), *decide((4, 5), 2, 2)]
    assert [each.name for each in split_records(shared)[0]] == [
        'queries of stage 1', 'queries of stage 2',
    ]  # fmt: skip
    blocks = titles(draw_tokens(PICTURE, [*decide((8, 10), 3, 0, 2)], per_block=True))
    assert blocks[1:] == [
        'queries of stage 1, block 1\n80 of 80 tokens',
        'queries of stage 1, block 2\n6 of 80 tokens',
    ]


def test_colors_are_the_same_in_every_picture():
    """A uniform map has the color of its granularity, not the middle of a scale of its own."""
    fine, coarse = (
        to_pixels(draw_tokens(PICTURE, [*decide((8, 10), 3, c, c), *decide((4, 5), 2, 0, 2)]), 40)
        for c in (0, 2)
    )
    assert fine.shape == coarse.shape and (fine != coarse).any()
    assert fine.dtype == np.uint8 and fine.shape[2] == 3


@pytest.mark.parametrize('name', FAMILIES)
def test_every_backbone_is_drawn(name):
    family = FAMILIES[name]
    model = MODELS.build(dict(type=f'mmtoken.{name}', **family.variants[0])).eval()
    routing = routing_override(**{model.ratio_name: 0.5}) if model.ratio_name else nullcontext()
    with torch.no_grad(), record_tokens() as records, routing:
        model(torch.rand(1, 3, 80, 112))
    figure = draw_tokens(np.zeros((80, 112, 3), np.uint8), records, title=name)
    assert len(titles(figure)) > 1
    pixels = to_pixels(figure, 20)
    assert pixels.std() > 0


@pytest.mark.parametrize('name', FAMILIES)
def test_records_do_not_change_outputs(name):
    model = MODELS.build(dict(type=f'mmtoken.{name}', **FAMILIES[name].variants[0])).eval()
    images = torch.rand(2, 3, 80, 112)
    with torch.no_grad():
        plain = model(images)
        with record_tokens() as records:
            recorded = model(images)
    for ours, theirs in zip(recorded, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert all(len(getattr(each, 'owner', each[0])) == 2 for each in records)


@pytest.mark.parametrize('name', [n for n, f in FAMILIES.items() if 'PSViT' not in n])
def test_dense_twins_record_nothing(name):
    cls = type(MODELS.build(dict(type=f'mmtoken.{name}', **FAMILIES[name].variants[0])))
    args = dict(FAMILIES[name].variants[0], **cls.twin_args)
    model = MODELS.build(dict(type=f'mmtoken.{name}', **args)).eval()
    with torch.no_grad(), record_tokens() as records:
        model(torch.rand(1, 3, 80, 112))
    assert not records
