"""Blocks and stages that share attention maps."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mmtoken.layers.psvit.sharing import (
    SharedMap,
    SharingStage,
    ValueOnlyAttention,
)
from mmtoken.layers.psvit.windows import RaggedWindows
from mmtoken.runtime.reference import reference_path

GOLDEN = Path(__file__).parents[2] / 'data' / 'psvit_inferred_golden.npz'
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
                    else:
                        v = block.attn.v(normed)
                    v = v.unflatten(-1, (3, 8)).transpose(1, 2)
                    tokens = tokens + block.attn.proj((weights @ v).transpose(1, 2).flatten(2))
                    tokens = tokens + block.mlp(block.norm2(tokens))
                start += size
            x[:, top : top + side, left : left + side] = tokens.view_as(window)
    return x


@pytest.mark.parametrize('on_reference', [False, True])
def test_golden(on_reference):
    """Two layers on one map, in double precision."""
    golden = {k: torch.from_numpy(v) for k, v in np.load(GOLDEN).items()}
    x, heads = golden['x'], golden['A'].shape[1]
    shared = SharedMap(RaggedWindows(((1, x.shape[1]),), None, None))

    def run():
        q, k, v = ((x @ golden[w]).unflatten(-1, (heads, -1)) for w in ('wq', 'wk', 'wv1'))
        y1 = x + shared.compute(q, k, v).flatten(2) @ golden['wo1']
        v = (y1 @ golden['wv2']).unflatten(-1, (heads, -1))
        return y1, y1 + shared.reuse(v).flatten(2) @ golden['wo2']

    if on_reference:
        with reference_path():
            y1, y2 = run()
        torch.testing.assert_close(shared.maps[0], golden['A'], atol=1e-12, rtol=0)
    else:
        y1, y2 = run()
        assert not shared.maps
    torch.testing.assert_close(y1, golden['y1'], atol=1e-12, rtol=0)
    torch.testing.assert_close(y2, golden['y2'], atol=1e-12, rtol=0)


@pytest.mark.parametrize('window_size', [None, 1, 3, 6])
@pytest.mark.parametrize('grid', [(1, 1), (6, 3), (7, 8), (2, 9)])
def test_stage_is_the_papers(window_size, grid):
    """In training, in inference, and on the reference path."""
    stage = make(window_size=window_size)
    x = torch.randn(2, *grid, 24)
    expected = plainly(stage, x)
    torch.testing.assert_close(stage.train()(x), expected, atol=2e-5, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(stage.eval()(x), expected, atol=2e-5, rtol=1e-4)
        with reference_path():
            torch.testing.assert_close(stage(x), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize('with_cp', [False, True])
def test_gradients_are_those_of_the_reference(with_cp):
    stage = make(window_size=4, with_cp=with_cp)
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


def test_weights_without_values_are_refused():
    attention = ValueOnlyAttention(24, 3)
    state = copy.deepcopy(attention.state_dict())
    del state['v.weight']
    with pytest.raises(RuntimeError, match=r'Missing key.*v\.weight'):
        attention.load_state_dict(state, strict=True)


def test_stochastic_depth_drops_images():
    """All windows of an image alike."""
    stage = make((3,), window_size=2, drop_path=[0.6] * 3).train()
    x = torch.randn(4, 5, 5, 24)
    with torch.no_grad():
        for _ in range(10):
            same = (stage(x) == x).all(dim=-1).flatten(1)
            assert torch.equal(same.all(dim=1), same.any(dim=1))
