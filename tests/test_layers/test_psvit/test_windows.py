import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtoken.layers.psvit.windows import cut_windows

CPU = torch.device('cpu')
sides = st.integers(1, 17)


@settings(max_examples=60, deadline=None)
@given(height=sides, width=sides, size=st.integers(1, 9))
def test_windows_are_those_of_the_grid(height, width, size):
    """Each holds what is on the grid of one ``size x size`` square, row by row."""
    cut = cut_windows((height, width), size, CPU)
    square = torch.arange(height)[:, None] // size * width + torch.arange(width) // size
    tokens = torch.stack([torch.arange(height * width), square.flatten()], dim=-1)[None]
    pieces = cut.to_windows(tokens).split([number * length for number, length in cut.pieces], dim=1)
    squares = []
    for piece, (number, length) in zip(pieces, cut.pieces, strict=True):
        token, square = piece.view(number, length, 2).unbind(-1)
        assert (token.diff() > 0).all() and (square == square[:, :1]).all()
        squares += square[:, 0].tolist()
    assert sorted(squares) == tokens[..., 1].unique().tolist()


@settings(max_examples=60, deadline=None)
@given(height=sides, width=sides, size=st.integers(1, 9))
def test_there_and_back(height, width, size):
    cut, x = cut_windows((height, width), size, CPU), torch.randn(2, height * width, 3)
    assert torch.equal(cut.to_grid(cut.to_windows(x)), x)


@pytest.mark.parametrize('size', [None, 7, 20])
def test_one_window_needs_no_order(size):
    cut = cut_windows((5, 7), size, CPU)
    assert cut.pieces == ((1, 35),) and cut.order is cut.places is None
