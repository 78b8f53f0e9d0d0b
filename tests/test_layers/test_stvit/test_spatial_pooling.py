import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmtoken.layers.stvit.semantic_vit import SpatialPooling

POOLINGS = ['attention', 'max', 'mean']


def pool_in_loops(pool, x):
    """What :class:`SpatialPooling` computes, tile by tile and token by token."""
    batch, height, width, channels = x.shape
    size = pool.size
    top, left = (-height % size) // 2, (-width % size) // 2
    rows, columns = -(-height // size), -(-width // size)
    pooled = x.new_zeros(batch, rows, columns, channels)
    for b in range(batch):
        for i in range(rows):
            for j in range(columns):
                tile, inside = x.new_zeros(channels, size, size), []
                for u in range(size):
                    for v in range(size):
                        row, column = i * size + u - top, j * size + v - left
                        if 0 <= row < height and 0 <= column < width:
                            tile[:, u, v] = x[b, row, column]
                            inside.append((u, v))
                tokens = torch.stack([tile[:, u, v] for u, v in inside])
                if pool.pooling == 'max':
                    pooled[b, i, j] = tokens.max(dim=0).values
                elif pool.pooling == 'mean':
                    pooled[b, i, j] = tokens.mean(dim=0)
                else:
                    mixed = pool.conv(tile[None])[0]
                    scores = [pool.score(F.gelu(pool.norm(mixed[:, u, v]))) for u, v in inside]
                    pooled[b, i, j] = (torch.stack(scores).softmax(dim=0) * tokens).sum(dim=0)
    return pooled.flatten(1, 2)


@pytest.mark.parametrize('pooling', POOLINGS)
@pytest.mark.parametrize('grid, size', [((14, 14), 4), ((8, 12), 4), ((1, 7), 3), ((5, 6), 5)])
def test_equals_the_loops(pooling, grid, size):
    pool = SpatialPooling(6, size, pooling)
    for parameter in pool.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, *grid, 6) - 3  # below the zeros of the padding
    with torch.no_grad():
        torch.testing.assert_close(pool(x), pool_in_loops(pool, x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('pooling', POOLINGS)
@pytest.mark.parametrize(
    'grid, tokens', [((14, 14), 16), ((16, 16), 16), ((50, 80), 260), ((1, 1), 1)]
)
def test_number_of_tokens(pooling, grid, tokens):
    assert SpatialPooling(4, 4, pooling)(torch.randn(1, *grid, 4)).shape == (1, tokens, 4)


def test_padding_is_split_evenly():
    """The corner tiles of 14 x 14 hold 3 x 3 tokens each, as in the paper."""
    x = torch.zeros(1, 14, 14, 1)
    for row in (slice(0, 3), slice(11, 14)):
        for column in (slice(0, 3), slice(11, 14)):
            x[:, row, column] = 1
    pooled = SpatialPooling(1, 4, 'mean')(x).view(4, 4)
    corners = torch.zeros(4, 4)
    corners[::3, ::3] = 1
    torch.testing.assert_close(pooled, corners)


@pytest.mark.parametrize(
    'bad, message', [(dict(pooling='min'), "got 'min'"), (dict(size=0), 'got 0')]
)
def test_bad_arguments(bad, message):
    with pytest.raises(ValueError, match=message):
        SpatialPooling(**{'embed_dims': 4, 'size': 4, **bad})
