import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtoken.layers.common.windows import (
    max_pool_windows,
    pad_to_windows,
    shift_mask,
    shifted_window_mask,
    window_index,
    window_partition,
    window_reverse,
)

sides = st.integers(1, 17)


@settings(max_examples=50, deadline=None)
@given(height=sides, width=sides, size=st.integers(1, 8), batch=st.integers(1, 3))
def test_partition_and_merge_are_inverse(height, width, size, batch):
    x = torch.randn(batch, height, width, 2)
    windows = window_partition(pad_to_windows(x, size), size)
    assert windows.shape == (batch * -(-height // size) * -(-width // size), size * size, 2)
    assert torch.equal(window_reverse(windows, size, (height, width)), x)


@settings(max_examples=50, deadline=None)
@given(rows=st.integers(1, 3), columns=st.integers(1, 3), size=st.integers(1, 8), data=st.data())
def test_max_pool_is_adaptive_max_pool(rows, columns, size, data):
    pooled = data.draw(st.integers(1, size))
    x = torch.randn(2, rows * size, columns * size, 3)
    windows = window_partition(x, size).transpose(1, 2).unflatten(2, (size, size))
    expected = F.adaptive_max_pool2d(windows, pooled).flatten(2).transpose(1, 2)
    grid = (rows * pooled, columns * pooled)
    assert torch.equal(max_pool_windows(x, size, pooled), window_reverse(expected, pooled, grid))


@settings(max_examples=30, deadline=None)
@given(height=sides, width=sides, size=st.integers(2, 8), data=st.data())
def test_window_index_says_what_partition_does(height, width, size, data):
    shift = data.draw(st.integers(0, size - 1))
    x = pad_to_windows(torch.randn(1, height, width, 1), size)
    expected = window_partition(x.roll((-shift, -shift), (1, 2)), size).squeeze(-1)
    tokens = torch.cat([x[:, :height, :width].flatten(), torch.zeros(1)])
    assert torch.equal(tokens[window_index((height, width), size, shift)], expected)


def test_shifted_mask_separates_what_the_shift_joined():
    size, shift, height, width = 4, 2, 8, 12
    mask = shifted_window_mask((height, width), size, shift, torch.device('cpu'), torch.float32)
    assert mask.shape == (6, 1, 16, 16)
    # Tokens may attend if their distance in the window is their distance on the unshifted grid.
    place = torch.stack(
        torch.meshgrid(torch.arange(height), torch.arange(width), indexing='ij'), dim=-1
    )[None]
    rolled = window_partition(place.roll((-shift, -shift), (1, 2)), size)
    near = ((rolled[:, :, None] - rolled[:, None]).abs() < size).all(-1)
    assert torch.equal(mask[:, 0] == 0, near)


@settings(max_examples=30, deadline=None)
@given(height=sides, width=sides, size=st.integers(2, 8), data=st.data())
def test_four_patterns_make_the_masks_of_all_windows(height, width, size, data):
    shift = data.draw(st.integers(1, size - 1))
    region = pad_to_windows(torch.zeros(1, height, width, 1), size)
    spans = (slice(0, -size), slice(-size, -shift), slice(-shift, None))
    for i, rows in enumerate(spans):
        for j, columns in enumerate(spans):
            region[:, rows, columns] = 3 * i + j
    region = window_partition(region, size).squeeze(-1)
    expected = (region[:, None] != region[:, :, None]).unsqueeze(1)
    patterns, window = shift_mask((height, width), size, shift)
    assert len(patterns) == 4 and torch.equal(patterns[window], expected)
