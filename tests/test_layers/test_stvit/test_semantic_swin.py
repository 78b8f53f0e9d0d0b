"""The blocks and units of STViT-R, against their formulas."""

from functools import partial

import pytest
import torch
from helpers import randomize
from torch import nn

from mmtoken.layers.common.attention import attention_reference, join_heads, split_heads
from mmtoken.layers.common.windows import window_index
from mmtoken.layers.stvit.semantic_swin import (
    SemanticBlock,
    SemanticStage,
    WindowPositionConv,
    WindowSpec,
    attend_in_windows,
    attend_to_all,
    attend_to_window_and_patch,
    clamped_patches,
    classification_unit,
    dense_unit,
    join_tokens,
    patches_of_image,
    pool_windows,
)

WINDOWS = WindowSpec(size=7, pooled_size=3, pad_mask='exact')
UNITS = {
    'dense': partial(dense_unit, windows=WINDOWS, key_sizes=(14, 21, 27)),
    'classification': partial(classification_unit, windows=WINDOWS),
}


def make_stage(form, use_global=False, units=1, **kwargs):
    args = dict(shortcut=form == 'dense', conv_pos=False, downsample=None, with_cp=False) | kwargs
    rates = [0.0] * 6 * units
    block = dict(embed_dims=16, num_heads=2)
    stage = SemanticStage(block, rates, WINDOWS, UNITS[form], use_global=use_global, **args)
    return randomize(stage).eval()


def attention(query, key, value, visible):
    """Each query to the keys that it may see, ``visible`` being ``(Q, K)``."""
    bias = torch.zeros(visible.shape).masked_fill(~visible, float('-inf'))
    heads = (split_heads(t, 2) for t in (query, key, value))
    return join_heads(attention_reference(*heads, bias))


def window_of(grid, size):
    """Which window each token is in, row by row."""
    index = window_index(grid, size)
    window = torch.empty(grid[0] * grid[1] + 1, dtype=torch.long)
    window[index.flatten()] = torch.arange(len(index)).repeat_interleave(size**2)
    return window[:-1]


@pytest.mark.parametrize('shortcut', [True, False])
def test_block_is_its_formula(shortcut):
    block = randomize(SemanticBlock(16, 2, shortcut=shortcut))
    query, tokens = torch.randn(2, 4, 5, 16), torch.randn(2, 11, 16)
    q = block.attn.q(block.norm1(query)).flatten(1, 2)
    key, value = block.attn.kv(block.norm1(tokens)).chunk(2, dim=-1)
    attended = attention(q, key, value, torch.ones(20, 11, dtype=torch.bool)).view_as(query)
    x = block.layer_scale_1 * block.attn.proj(attended)
    if shortcut:
        x = x + query
    expected = x + block.layer_scale_2 * block.mlp(block.norm2(x))
    torch.testing.assert_close(block(query, tokens, attend_to_all), expected)


def test_attention_in_windows():
    query, key_value = torch.randn(2, 6, 9, 16), torch.randn(2, 6, 9, 32)
    window = window_of((6, 9), 3)
    key, value = key_value.flatten(1, 2).chunk(2, dim=-1)
    expected = attention(query.flatten(1, 2), key, value, window[:, None] == window)
    out = attend_in_windows(query, key_value, 2, size=3)
    torch.testing.assert_close(out.flatten(1, 2), expected)


def test_attention_to_window_and_patch():
    grid = (10, 17)
    semantic = torch.randn(2, *WINDOWS.pooled_grid(grid), 16)
    tokens = join_tokens(torch.randn(2, 6, 9, 32), torch.randn(2, *grid, 32))
    patches = clamped_patches(grid, 10, 7)
    window = window_of((6, 9), 3)
    around = torch.zeros(len(patches), grid[0] * grid[1], dtype=torch.bool)
    around.scatter_(1, patches, torch.ones_like(patches, dtype=torch.bool))
    visible = torch.cat([window[:, None] == window, around[window]], dim=1)
    expected = attention(semantic.flatten(1, 2), *tokens.chunk(2, dim=-1), visible)
    out = attend_to_window_and_patch(semantic, tokens, 2, 3, patches)
    torch.testing.assert_close(out.flatten(1, 2), expected)


@pytest.mark.parametrize('grid', [(14, 14), (16, 16), (7, 25), (5, 9), (40, 3)])
@pytest.mark.parametrize('window', [7, 8])
def test_clamped_patches_lie_around_their_windows(grid, window):
    """The released constants, 10 and 4, hold for 14 x 14 tokens only."""
    patches = clamped_patches(grid, window + window // 2, window)
    assert patches.min() >= 0 and patches.max() < grid[0] * grid[1]
    for patch, tokens in zip(patches, window_index(grid, window), strict=True):
        real = tokens[tokens < grid[0] * grid[1]]
        assert torch.isin(real, patch).all()


def test_pooling_with_positions():
    """The convolution does not look beyond a window."""
    conv, x = randomize(WindowPositionConv(16)), torch.randn(1, 14, 21, 16)
    plain, with_positions = (pool_windows(x, WINDOWS, c) for c in (None, conv))
    assert plain.shape == (1, 6, 9, 16)
    torch.testing.assert_close(plain[0, 0, 0], x[0, :3, :3].amax((0, 1)))
    window = plain[:, :3, 3:6].permute(0, 3, 1, 2)
    expected = window + conv.proj(window)
    torch.testing.assert_close(with_positions[:, :3, 3:6].permute(0, 3, 1, 2), expected)


@pytest.mark.parametrize('form', UNITS)
def test_units_follow_the_paper(form):
    """Pool, reduce, local, global, recover, in this order; the image tokens in between stay."""
    stage, x = make_stage(form), torch.randn(1, 10, 17, 16)
    seen = []
    for i, block in enumerate(stage.blocks):
        block.register_forward_hook(lambda m, args, out, i=i: seen.append((i, args[0], out)))
    with torch.no_grad():
        out = stage(x)
    assert [i for i, *_ in seen] == [0, 1, 2, 3, 4, 5]
    for _, query, updated in seen[1:5]:
        assert query.shape == updated.shape == (1, 6, 9, 16)
    for (_, _, before), (_, query, _) in zip(seen[1:4], seen[2:5], strict=True):
        assert torch.equal(before, query)
    assert seen[5][1] is seen[0][2] and torch.equal(out, seen[5][2])


@pytest.mark.parametrize('form', UNITS)
def test_learned_centers_go_to_the_reduce_block_of_the_first_unit(form):
    stage, x = make_stage(form, use_global=True, units=2), torch.randn(1, 10, 17, 16)
    centers = stage.centers(x.shape[1:3])
    assert centers.shape == (1, 6, 9, 16)
    assert torch.equal(stage.centers((14, 14)).flatten(1, 2), stage.semantic_token2)
    args, outs = {}, {}
    for i in (1, 2, 7, 8):
        stage.blocks[i].register_forward_hook(
            lambda module, given, out, i=i: args.update({i: given}) or outs.update({i: out})
        )
    with torch.no_grad():
        stage(x)
    torch.testing.assert_close(args[2][0], outs[1] + centers)
    assert torch.equal(args[8][0], outs[7])
    if form == 'classification':  # the keys are without centers
        assert torch.equal(args[2][1][:, :54], outs[1].flatten(1, 2))


def test_shortcut_keeps_the_pooled_tokens():
    with_shortcut, without = (randomize(SemanticBlock(16, 2, shortcut=s)) for s in (True, False))
    without.load_state_dict(with_shortcut.state_dict())
    for block in (with_shortcut, without):
        nn.init.zeros_(block.layer_scale_2)
    semantic, x = torch.randn(1, 6, 6, 16), torch.randn(1, 14, 14, 16)
    around = patches_of_image(x, WINDOWS, 14)
    torch.testing.assert_close(
        with_shortcut(semantic, *around), semantic + without(semantic, *around)
    )
