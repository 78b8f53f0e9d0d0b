import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mmtoken.layers.common.old_tiles import (
    TILE_ELEMENTS,
    chunked_apply,
    plan_window_tiles,
    tokens_per_tile,
    use_tiling,
)
from mmtoken.layers.common.windows import (
    pad_to_windows,
    shifted_window_mask,
    window_partition,
)
from mmtoken.runtime.reference import reference_path


@settings(max_examples=50, deadline=None)
@given(
    batch=st.integers(1, 3),
    grid=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    size=st.integers(2, 7),
    length=st.integers(1, 150),
    data=st.data(),
)
def test_tiles_cover_every_token_once(batch, grid, size, length, data):
    shift = data.draw(st.integers(0, size - 1))
    tiles = plan_window_tiles(batch, grid, size, shift, length)
    tokens = torch.cat([t.tokens for t in tiles])
    assert torch.equal(tokens.sort().values, torch.arange(batch * grid[0] * grid[1]))
    assert all(len(t.tokens) <= max(length, size**2) for t in tiles)


@settings(max_examples=50, deadline=None)
@given(
    batch=st.integers(1, 2),
    grid=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    size=st.integers(2, 7),
    length=st.integers(1, 150),
    data=st.data(),
)
def test_tiles_hold_the_windows_of_the_shifted_grid(batch, grid, size, length, data):
    """Whatever order they come in, with the mask of each."""
    shift = data.draw(st.integers(0, size - 1))
    x = torch.arange(1.0, batch * grid[0] * grid[1] + 1).view(batch, *grid, 1)
    padded = pad_to_windows(x, size).roll((-shift, -shift), dims=(1, 2))
    expected = window_partition(padded, size).squeeze(-1)
    masks = torch.zeros(len(expected), size**2, size**2)
    if shift:
        mask = shifted_window_mask(grid, size, shift, torch.device('cpu'), torch.float32)
        masks = mask[:, 0].repeat(batch, 1, 1)
    expected = {tuple(w.tolist()): m for w, m in zip(expected, masks, strict=True)}

    found = {}
    for tile in plan_window_tiles(batch, grid, size, shift, length):
        tokens = x.view(-1, 1)[tile.tokens]
        windows = tile.to_windows(tokens, torch.zeros(1))
        assert torch.equal(tile.to_tokens(windows), tokens)
        windows = windows.view(-1, size**2)
        apart = tile.apart
        if apart is None:
            apart = torch.zeros(len(windows), 1, size**2, size**2, dtype=torch.bool)
        found.update(zip(map(tuple, windows.tolist()), apart[:, 0], strict=True))
    assert found.keys() == expected.keys()
    for window, mask in expected.items():
        assert torch.equal(found[window], mask == float('-inf'))


def test_inner_tiles_know_neither_padding_nor_mask():
    inner, border = plan_window_tiles(1, (20, 30), 7, 3, 10_000)
    assert inner.slots is inner.places is inner.apart is None
    assert len(inner.tokens) == 2 * 3 * 49
    assert border.slots is not None and border.apart is not None


@pytest.mark.parametrize('tokens', [1, 7, 5000])
def test_tokenwise_functions(tokens):
    x, y = torch.randn(2, tokens, 96), torch.randn(2, tokens, 8)

    def function(x, y):
        calls.append(len(x))
        return x.sin() + y.sum(-1, keepdim=True)

    for context, training, tiles in (
        (torch.no_grad(), False, -(-2 * tokens // 2000)),
        (torch.no_grad(), True, 1),
        (torch.enable_grad(), False, 1),
    ):
        calls = []
        with context:
            out = chunked_apply(function, x, y, training=training, layers=())
        torch.testing.assert_close(out, x.sin() + y.sum(-1, keepdim=True), atol=0, rtol=0)
        assert len(calls) == tiles


def test_only_inference_works_in_tiles():
    x = torch.zeros(1)
    assert not use_tiling(x, training=False)
    with torch.no_grad():
        assert use_tiling(x, training=False)
        assert not use_tiling(x, training=True)
        assert not use_tiling(x.to('meta'), training=False)
        with reference_path():
            assert not use_tiling(x, training=False)


def test_tiles_are_for_plain_layers():
    layer, x = nn.Linear(96, 8), torch.randn(5000, 96)
    with torch.no_grad():
        assert use_tiling(x, False, layer)
        calls = []
        layer.register_forward_hook(lambda module, args, out: calls.append(len(out)))
        assert not use_tiling(x, False, layer)
        chunked_apply(layer, x, training=False, layers=(layer,))
    assert calls == [5000]


def test_tiles_are_as_large_for_any_width():
    assert tokens_per_tile(96) == 2000 and tokens_per_tile(384) == 500
    assert tokens_per_tile(2 * TILE_ELEMENTS) == 1
