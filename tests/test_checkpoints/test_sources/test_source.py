"""Rules that describe the names of a family."""

import pytest
import torch

from mmtoken.checkpoints.sources.source import Layout, Source, is_square, matches_any, rename_with

RENAME = rename_with((r'encoder\.(\d)\.', r'blocks.\1.'), (r'head\.', None))
LAYOUTS = (
    Layout('theirs', (r'encoder\.0\..*', r'stem\..*'), RENAME),
    Layout('anybody', (r'.*\.0\..*',), RENAME),
)
NAMES = ['stem.weight', 'encoder.0.weight', 'head.bias']


def test_first_rule_that_matches_applies():
    state = {name: torch.zeros(i) for i, name in enumerate(NAMES)}
    renamed = RENAME(state)
    assert {new: old for new, (old, _) in renamed.items()} == {
        'stem.weight': 'stem.weight', 'blocks.0.weight': 'encoder.0.weight',
    }  # fmt: skip
    assert renamed['blocks.0.weight'][1] is state['encoder.0.weight']


def test_two_names_may_not_become_one():
    with pytest.raises(
        ValueError, match=r'blocks\.0\.a and encoder\.0\.a both become blocks\.0\.a'
    ):
        RENAME({'blocks.0.a': torch.zeros(1), 'encoder.0.a': torch.zeros(1)})


@pytest.mark.parametrize(
    'names, layout', [(NAMES, 'theirs'), (NAMES[1:], 'anybody'), (NAMES[2:], None)]
)
def test_most_specific_layout(names, layout):
    source = Source('a', LAYOUTS, known_keys='.*')
    found = source.layout_of(names)
    assert (found and found.name) == layout and source.matches(names) == (layout is not None)
    signed = Source('a', LAYOUTS, known_keys='.*', key_signature='router')
    assert not signed.matches(names) and signed.matches([*names, 'router']) == bool(layout)


def test_patterns_match_whole_names():
    assert matches_any('a', ['b', 'a']) and not matches_any('a', ['ab'])


def test_squares():
    assert [n for n in range(30) if is_square(n)] == [1, 4, 9, 16, 25]
