import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtoken.layers.psvit.windows import RaggedWindows, divide_into_windows

CPU = torch.device('cpu')
sides = st.integers(1, 17)


@settings(max_examples=60, deadline=None)
@given(height=sides, width=sides, size=st.integers(1, 9))
def test_windows_are_those_of_the_grid(height, width, size):
    """Each holds what is on the grid of one ``size x size`` square, row by row."""
    windows = divide_into_windows((height, width), size, CPU)
    square = torch.arange(height)[:, None] // size * width + torch.arange(width) // size
    tokens = torch.stack([torch.arange(height * width), square.flatten()], dim=-1)[None]
    sizes = [number * length for number, length in windows.groups]
    pieces = windows.to_windows(tokens).split(sizes, dim=1)
    squares = []
    for piece, (number, length) in zip(pieces, windows.groups, strict=True):
        token, square = piece.view(number, length, 2).unbind(-1)
        assert (token.diff() > 0).all() and (square == square[:, :1]).all()
        squares += square[:, 0].tolist()
    assert sorted(squares) == tokens[..., 1].unique().tolist()


@settings(max_examples=60, deadline=None)
@given(height=sides, width=sides, size=st.integers(1, 9))
def test_there_and_back(height, width, size):
    windows, x = divide_into_windows((height, width), size, CPU), torch.randn(2, height * width, 3)
    assert torch.equal(windows.to_grid(windows.to_windows(x)), x)


@pytest.mark.parametrize('size', [None, 7, 20])
def test_one_window_needs_no_order(size):
    windows = divide_into_windows((5, 7), size, CPU)
    assert windows.groups == ((1, 35),) and windows.perm is windows.inverse_perm is None


def test_groups_are_split_and_joined():
    windows, x = RaggedWindows(((2, 3), (1, 4)), None, None), torch.randn(2, 10, 3, 8)
    parts = windows.split(x)
    assert [tuple(part.shape) for part in parts] == [(4, 3, 3, 8), (2, 3, 4, 8)]
    assert torch.equal(parts[1][1].transpose(0, 1), x[1, 6:])
    assert torch.equal(windows.join(parts), x)
