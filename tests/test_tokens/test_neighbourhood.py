import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtoken.tokens.neighbourhood import (
    attend_gathered,
    attend_whole_grid,
    neighbourhood_attention,
    plan_neighbourhoods,
)

MASKS = ['released', 'exact', None]


def plan(grid, size, stride, hidden, pad_mask, dtype=torch.float64):
    return plan_neighbourhoods(grid, size, stride, *hidden, pad_mask, torch.device('cpu'), dtype)


def naive(query, key, value, grid, size, stride, hidden, pad_mask, num_heads):
    """Window by window, key by key, from the definition."""
    (height, width), before = grid, (size - stride) // 2
    rows, columns = -(-height // stride), -(-width // stride)
    out = torch.empty_like(query).unflatten(1, (rows * columns, -1))
    queries = query.unflatten(1, (rows * columns, -1))
    for b, (i, j) in itertools.product(
        range(len(query)), itertools.product(range(rows), range(columns))
    ):
        keys, masked = [], []
        for dy, dx in itertools.product(range(size), range(size)):
            y, x = i * stride - before + dy, j * stride - before + dx
            inside = 0 <= y < height and 0 <= x < width
            keys.append(y * width + x if inside else height * width)
            outside = not (0 <= y < rows * stride and 0 <= x < columns * stride)
            low = y >= rows * stride - hidden[0]
            right = x >= columns * stride - hidden[1]
            if pad_mask == 'released':
                low, right = low or not hidden[0], right or not hidden[1]
                masked.append(outside or (low and right))
            else:
                masked.append(pad_mask == 'exact' and (outside or low or right))
        seen = [k for k, m in zip(keys, masked, strict=True) if not m] or keys
        split = [t.unflatten(-1, (num_heads, -1)).transpose(0, 1)
                 for t in (queries[b, i * columns + j], key[b, seen], value[b, seen])]  # fmt: skip
        scores = split[0] @ split[1].transpose(1, 2) * split[0].shape[-1] ** -0.5
        out[b, i * columns + j] = (scores.softmax(-1) @ split[2]).transpose(0, 1).flatten(1)
    return out.flatten(1, 2)


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(1, 12),
    width=st.integers(1, 12),
    stride=st.integers(1, 5),
    extra=st.integers(0, 9),
    pad_mask=st.sampled_from(MASKS),
    data=st.data(),
)
def test_forms_equal_the_definition(height, width, stride, extra, pad_mask, data):
    size, grid = stride + extra, (height, width)
    # As the blocks use it: at least the padding is hidden, never a whole axis of windows.
    hidden = tuple(-side % stride for side in grid)
    if pad_mask == 'released':
        hidden = tuple(data.draw(st.integers(0, 6)) for _ in grid)
    windows = -(-height // stride) * -(-width // stride)
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, windows * 3, 8, dtype=torch.float64, generator=generator)
    key, value = torch.randn(
        2, 2, height * width + 1, 8, dtype=torch.float64, generator=generator
    ).unbind()
    p = plan(grid, size, stride, hidden, pad_mask)
    expected = naive(query, key, value, grid, size, stride, hidden, pad_mask, num_heads=2)
    for form in (attend_gathered, attend_whole_grid, neighbourhood_attention):
        actual = form(query, key, value, p, 2)
        torch.testing.assert_close(actual, expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize('pad_mask', MASKS)
def test_forms_have_equal_gradients(pad_mask):
    grid = (10, 17)
    p = plan(grid, 9, 4, (2, 3), pad_mask)
    tensors = [torch.randn(2, n, 8, dtype=torch.float64, requires_grad=True)
               for n in (15 * 5, 171, 171)]  # fmt: skip
    weight = torch.randn(2, 75, 8, dtype=torch.float64)
    grads = [
        torch.autograd.grad((form(*tensors, p, 2) * weight).sum(), tensors)
        for form in (attend_gathered, attend_whole_grid)
    ]
    for gathered, whole in zip(*grads, strict=True):
        torch.testing.assert_close(gathered, whole, atol=1e-9, rtol=1e-9)


def test_released_mask_of_an_unpadded_grid_hides_nothing():
    assert plan((14, 14), 14, 7, (0, 0), 'released').hidden is None
    assert plan((14, 14), 14, 7, (0, 0), 'exact').hidden.any()


def test_plans_are_cached():
    assert plan((8, 9), 5, 4, (0, 3), 'exact') is plan((8, 9), 5, 4, (0, 3), 'exact')
