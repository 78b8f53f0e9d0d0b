"""Blocks and stages that share attention maps."""

import copy

import pytest
import torch
from torch import nn

from mmtoken.layers.common import old_tiles as tiles
from mmtoken.layers.common.vit import ViTBlock
from mmtoken.layers.psvit.sharing import GroupAttention, SharedMapBlock, ValueOnlyAttention
from mmtoken.layers.psvit.stage import SharingStage
from mmtoken.runtime.reference import reference_path

MODES = ['auto', 'map', 'query_key']
GROUPS = (2, 1, 3)


def make(groups=GROUPS, **kwargs):
    stage = SharingStage(24, 3, groups, 36, **kwargs)
    for name, parameter in stage.named_parameters():
        nn.init.normal_(parameter, std=0.2)
        if 'norm' in name and name.endswith('weight'):
            nn.init.normal_(parameter, 1, 0.1)
    return stage


def plainly(stage, x):
    """The stage, window by window, in the words of the paper."""
    x, side = x.clone(), stage.window_size or max(x.shape[1:3])
    for top in range(0, x.shape[1], side):
        for left in range(0, x.shape[2], side):
            window = x[:, top : top + side, left : left + side]
            tokens, start = window.flatten(1, 2), 0
            for size in stage.groups:
                for i, block in enumerate(stage.blocks[start : start + size]):
                    normed = block.norm1(tokens)
                    if i == 0:
                        q, k, v = block.attn.qkv(normed).chunk(3, dim=-1)
                        q, k = (t.unflatten(-1, (3, 8)).transpose(1, 2) for t in (q, k))
                        weights = (q @ k.transpose(-2, -1) / 8**0.5).softmax(dim=-1)
                    elif isinstance(block, SharedMapBlock):
                        v = block.attn.v(normed)
                    else:
                        v = block.attn.qkv(normed)[..., 48:]
                    v = v.unflatten(-1, (3, 8)).transpose(1, 2)
                    tokens = tokens + block.attn.proj((weights @ v).transpose(1, 2).flatten(2))
                    tokens = tokens + block.mlp(block.norm2(tokens))
                start += size
            x[:, top : top + side, left : left + side] = tokens.view_as(window)
    return x


@pytest.mark.parametrize('sharing', MODES)
@pytest.mark.parametrize('window_size', [None, 1, 3, 6])
@pytest.mark.parametrize('grid', [(1, 1), (6, 3), (7, 8), (2, 9)])
def test_stage_is_the_papers(sharing, window_size, grid, monkeypatch):
    """In training, in inference tile by tile, and on the reference path."""
    monkeypatch.setattr(tiles, 'TILE_ELEMENTS', 24 * 20)
    stage = make(sharing=sharing, window_size=window_size)
    x = torch.randn(2, *grid, 24)
    expected = plainly(stage, x)
    torch.testing.assert_close(stage.train()(x), expected, atol=2e-5, rtol=1e-4)
    with torch.no_grad():
        for training in (True, False):
            torch.testing.assert_close(stage.train(training)(x), expected, atol=2e-5, rtol=1e-4)
        with reference_path():
            torch.testing.assert_close(stage(x), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize('with_cp', [False, True])
@pytest.mark.parametrize('sharing', MODES)
def test_gradients_are_those_of_the_reference(sharing, with_cp):
    stage = make(sharing=sharing, window_size=4, with_cp=with_cp)
    x, weight = torch.randn(2, 6, 5, 24), torch.randn(2, 6, 5, 24)
    grads = []
    for on_reference in (False, True):
        image = x.clone().requires_grad_()
        if on_reference:
            with reference_path():
                (stage(image) * weight).sum().backward()
        else:
            (stage(image) * weight).sum().backward()
        grads.append([image.grad, *(p.grad for p in stage.parameters())])
        stage.zero_grad()
    for ours, reference in zip(*grads, strict=True):
        torch.testing.assert_close(ours, reference, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('groups', [(2, 1, 3), (1, 2), (6,), (1, 1, 1, 1, 1, 1), (3,)])
def test_a_dense_stage_runs_any_groups(groups):
    """As a stage built with them, with its weights; gradients too."""
    dense = make((1,) * 6)
    built = make(groups)
    built.load_state_dict(
        {k: v for k, v in dense.state_dict().items() if int(k.split('.')[1]) < sum(groups)}
    )
    dense.set_groups(groups)
    x = torch.randn(2, 4, 5, 24)
    for stage in (dense, built):
        stage(x).square().sum().backward()
    torch.testing.assert_close(dense(x), built(x))
    with torch.no_grad():
        torch.testing.assert_close(dense.eval()(x), built.eval()(x))
    for block, other in zip(dense.blocks, built.blocks, strict=False):
        torch.testing.assert_close(block.mlp.fc1.weight.grad, other.mlp.fc1.weight.grad)
        joint = block.attn.qkv.weight.grad
        if isinstance(other, SharedMapBlock):
            torch.testing.assert_close(joint[48:], other.attn.v.weight.grad)
            assert not joint[:48].any()
        else:
            torch.testing.assert_close(joint, other.attn.qkv.weight.grad)
    assert all(block.mlp.fc1.weight.grad is None for block in dense.blocks[sum(groups) :])
    dense.set_groups(None)
    assert dense.groups == (1,) * 6


@pytest.mark.parametrize('groups', [(), (2, 0), (-1, 2), (3, 4)])
def test_groups_must_fit(groups):
    stage = make((1,) * 6)
    with pytest.raises(ValueError, match='6 at most in all, got'):
        stage.set_groups(groups)
    assert stage.groups == (1,) * 6


def test_a_group_begins_with_a_map():
    stage = make((2, 2))
    stage.set_groups((2,))
    assert stage.groups == (2,)
    with pytest.raises(ValueError, match=r'built with \(2, 2\); one built with sharing=None'):
        stage.set_groups((1, 1))


@pytest.mark.parametrize('bias', [True, False])
def test_values_of_dense_weights(bias):
    """A warm start: what a dense block has beyond values is left out."""
    dense, follower = ViTBlock(24, 3, 36, bias), SharedMapBlock(24, 3, 36, bias)
    state = dense.state_dict()
    follower.load_state_dict(state, strict=True)
    assert 'attn.qkv.weight' in state
    x = torch.randn(5, 24)
    values = follower.attn.project(x)
    torch.testing.assert_close(values, dense.attn.project(x).chunk(3, dim=1)[2])
    torch.testing.assert_close(values, dense.attn.project(x, follow=True))


def test_weights_without_values_are_refused():
    attention = ValueOnlyAttention(24, 3)
    state = copy.deepcopy(attention.state_dict())
    del state['v.weight']
    with pytest.raises(RuntimeError, match=r'Missing key.*v\.weight'):
        attention.load_state_dict(state, strict=True)


def test_pieces_are_cut_and_joined():
    group, x = GroupAttention(2, ((2, 3), (1, 4)), None), torch.randn(20, 3, 8)
    parts = group.cut(x)
    assert [tuple(part.shape) for part in parts] == [(4, 3, 3, 8), (2, 3, 4, 8)]
    assert torch.equal(parts[1][1, 0], x[16:20, 0])
    assert torch.equal(group.join(parts), x)


def test_stochastic_depth_drops_images():
    """All windows of an image alike."""
    stage = make((3,), window_size=2, drop_path=[0.6] * 3).train()
    x = torch.randn(4, 5, 5, 24)
    with torch.no_grad():
        for _ in range(10):
            same = (stage(x) == x).all(dim=-1).flatten(1)
            assert torch.equal(same.all(dim=1), same.any(dim=1))


def test_maps_too_large_are_refused():
    stage = make((2,), sharing='map', max_map_tokens=30)
    stage(torch.randn(1, 5, 6, 24))
    with pytest.raises(ValueError, match=r'map of 35 tokens, of a grid of 5 x 7.*max_map_tokens'):
        stage(torch.randn(1, 5, 7, 24))
    for kwargs in (dict(sharing='auto'), dict(sharing='query_key'), dict(window_size=5)):
        make((2,), **dict(dict(sharing='map', max_map_tokens=30), **kwargs))(
            torch.randn(1, 5, 7, 24)
        )
    make((1, 1), sharing='map', max_map_tokens=30)(torch.randn(1, 5, 7, 24))
