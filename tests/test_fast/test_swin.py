import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mmtoken.fast import optimize_for_cpu
from mmtoken.fast.swin import plan_tiles
from mmtoken.layers.common.swin import SwinBlock
from mmtoken.layers.common.windows import pad_to_windows, shifted_window_mask, window_partition

GRIDS = dict(
    batch=st.integers(1, 3),
    grid=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    size=st.integers(2, 7),
    length=st.integers(1, 150),
    data=st.data(),
)


@settings(max_examples=50, deadline=None)
@given(**GRIDS)
def test_tiles_cover_every_token_once(batch, grid, size, length, data):
    shift = data.draw(st.integers(0, size - 1))
    tiles = plan_tiles(batch, grid, size, shift, length)
    tokens = torch.cat([t.tokens for t in tiles])
    assert torch.equal(tokens.sort().values, torch.arange(batch * grid[0] * grid[1]))
    assert all(len(t.tokens) <= max(length, size**2) for t in tiles)


@settings(max_examples=50, deadline=None)
@given(**GRIDS)
def test_tiles_hold_the_windows_of_the_shifted_grid(batch, grid, size, length, data):
    """In any order, with the mask of each."""
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
    for tile in plan_tiles(batch, grid, size, shift, length):
        tokens = x.view(-1, 1)[tile.tokens]
        windows = tile.to_windows(tokens, torch.zeros(1, 1))
        assert torch.equal(tile.to_tokens(windows), tokens)
        windows, mask = windows.view(-1, size**2), tile.mask
        if mask is None:
            mask = torch.zeros(len(windows), 1, size**2, size**2, dtype=torch.bool)
        found.update(zip(map(tuple, windows.tolist()), mask[:, 0], strict=True))
    assert found.keys() == expected.keys()
    for window, mask in expected.items():
        assert torch.equal(found[window], mask == float('-inf'))


def test_inner_tiles_have_neither_padding_nor_mask():
    inner, border = plan_tiles(1, (20, 30), 7, 3, 10_000)
    assert inner.slot_index is inner.inverse_index is inner.mask is None
    assert len(inner.tokens) == 2 * 3 * 49
    assert border.slot_index is not None and border.mask is not None


class MixingMlp(nn.Module):
    """An MLP that does not treat each token alone."""

    def __init__(self, embed_dims, hidden_dims):
        super().__init__()
        self.proj = nn.Linear(embed_dims, embed_dims)

    def forward(self, x):
        return self.proj(x.flip(1))


@torch.no_grad()
def test_an_mlp_that_mixes_tokens_sees_the_grid():
    block = SwinBlock(24, 3, mlp=MixingMlp).eval()
    x = torch.randn(1, 30, 40, 24)
    expected = block(x)
    optimize_for_cpu(block)
    torch.testing.assert_close(block(x), expected)
