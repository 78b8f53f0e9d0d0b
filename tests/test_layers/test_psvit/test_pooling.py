from pathlib import Path

import numpy as np
import pytest
import torch

from mmtoken.layers.psvit.pooling import TokenPooling

GOLDEN = Path(__file__).resolve().parent.parent / 'data' / 'psvit_inferred_golden.npz'
ALL = [('max', 3), ('max', 1), ('mean', 3), ('mean', 1), ('conv', 3)]


def see_through(pool):
    """A convolution that changes nothing."""
    torch.nn.init.zeros_(pool.proj.bias)
    torch.nn.init.dirac_(pool.proj.weight)
    return pool


@pytest.mark.parametrize('kernel', [3, 1])
def test_golden(kernel):
    golden = {k: torch.from_numpy(v) for k, v in np.load(GOLDEN).items()}
    grid = golden['grid'].tolist()
    pool = see_through(TokenPooling(12, 12, 'max', kernel)).double()
    out = pool(golden['x'].unflatten(1, grid)).flatten(1, 2)
    torch.testing.assert_close(out, golden['pool2d_k3s2p1'], atol=0, rtol=0)


@pytest.mark.parametrize('pooling, kernel', ALL)
@pytest.mark.parametrize('grid', [(1, 1), (2, 3), (7, 4), (8, 5)])
def test_the_grid_is_halved(pooling, kernel, grid):
    out = TokenPooling(3, 5, pooling, kernel)(torch.randn(2, *grid, 3))
    assert out.shape == (2, (grid[0] + 1) // 2, (grid[1] + 1) // 2, 5) and out.is_contiguous()


@pytest.mark.parametrize('pooling, reduce', [('max', torch.amax), ('mean', torch.mean)])
def test_pooling_sees_the_tokens_around(pooling, reduce):
    """Those of the grid alone: at a border there are fewer."""
    x = torch.randn(1, 5, 6, 4) - 3
    out = see_through(TokenPooling(4, 4, pooling, 1))(x)
    for row in range(3):
        for column in range(3):
            top, left = max(2 * row - 1, 0), max(2 * column - 1, 0)
            around = x[:, top : 2 * row + 2, left : 2 * column + 2]
            torch.testing.assert_close(out[:, row, column], reduce(around, dim=(1, 2)))


def test_a_stride_takes_every_other_token():
    x = torch.randn(1, 5, 6, 4)
    assert torch.equal(see_through(TokenPooling(4, 4, 'conv'))(x), x[:, ::2, ::2])


@pytest.mark.parametrize(
    'args, message',
    [
        (('min', 3), "got 'min'"),
        (('max', 2), 'pool_kernel must be 1 or 3, got 2'),
        (('conv', 1), 'skip three of four'),
    ],
)
def test_bad_arguments(args, message):
    with pytest.raises(ValueError, match=message):
        TokenPooling(4, 4, *args)
