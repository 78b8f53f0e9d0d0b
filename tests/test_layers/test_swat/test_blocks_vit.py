"""ViT blocks on structure-aware tokens."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import Block
from torch import nn

from mmtoken.layers.common import old_tiles as tiles
from mmtoken.layers.swat import structured
from mmtoken.layers.swat.blocks import GridBlock, StructuredBlock
from mmtoken.runtime.reference import reference_path

GOLDEN = Path(__file__).parents[2] / 'data' / 'swat_ops_golden.npz'
PARTS = {
    'n1': 'norm1',
    'at.ql': 'attn.qkv.linear',
    'at.qc': 'attn.qkv.conv',
    'at.pl': 'attn.proj.linear',
    'at.pc': 'attn.proj.conv',
    'n2': 'norm2',
    'ml.f1': 'mlp.fc1',
    'ml.dw': 'mlp.dwconv',
    'ml.f2': 'mlp.fc2',
}


def make(**kwargs):
    block = StructuredBlock(32, 2, 48, side=4, mlp_kernel=3, **kwargs).double()
    for name, parameter in block.named_parameters():
        nn.init.normal_(parameter, std=0.3)
        if 'norm' in name and name.endswith('weight'):
            nn.init.normal_(parameter, 1, 0.1)
    return block


def test_equals_the_release():
    golden = {name: torch.from_numpy(array) for name, array in np.load(GOLDEN).items()}
    state = {}
    for name, weight in golden.items():
        if name.startswith('vitblk.w.'):
            part, _, kind = name.removeprefix('vitblk.w.').rpartition('.')
            linear = part in ('ml.f1', 'ml.f2') and kind == 'weight'
            state[f'{PARTS[part]}.{kind}'] = weight.flatten(1) if linear else weight
    block = StructuredBlock(32, 2, 128, side=4).double().eval()
    block.load_state_dict(state)
    x = golden['vitblk.x'].unflatten(1, (3, 4))
    outs = [block(x)]
    with torch.no_grad():
        outs.append(block(x))
        with reference_path():
            outs.append(block(x))
    for out in outs:
        torch.testing.assert_close(out.flatten(1, 2), golden['vitblk.y'], atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize('grid', [(5, 7), (1, 1), (2, 9)])
@pytest.mark.parametrize('qkv_bias', [True, False])
def test_fast_path_is_the_reference(grid, qkv_bias):
    block = make(qkv_bias=qkv_bias).train()
    x = torch.randn(2, *grid, 32, dtype=torch.float64, requires_grad=True)
    inputs = [x, *block.parameters()]
    with reference_path():
        expected = block(x)
    weight = torch.randn_like(expected)
    out = block(x)
    torch.testing.assert_close(out, expected, atol=1e-10, rtol=1e-10)
    grads = torch.autograd.grad((out * weight).sum(), inputs)
    wanted = torch.autograd.grad((expected * weight).sum(), inputs)
    for grad, other in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, other, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize('length', [1, 3, 100])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
def test_inference_works_in_tiles(length, dtype, monkeypatch):
    """In float32 too, for which kernels are others."""
    block = make(drop_path=0.5).eval().to(dtype)
    x = torch.randn(2, 5, 7, 32, dtype=dtype)
    expected = block(x)
    monkeypatch.setattr(tiles, 'TILE_ELEMENTS', 32 * length)
    before = x.clone()
    with torch.no_grad():
        tolerance = 1e-10 if dtype == torch.float64 else 1e-4
        torch.testing.assert_close(block(x), expected, atol=tolerance, rtol=tolerance)
    assert torch.equal(x, before)


def test_weights_are_folded_once_a_forward(monkeypatch):
    block, x = make().eval(), torch.randn(1, 5, 7, 32, dtype=torch.float64)
    folded = []
    plan = structured.cell_offsets
    monkeypatch.setattr(structured, 'cell_offsets', lambda *args: folded.append(1) or plan(*args))
    monkeypatch.setattr(tiles, 'TILE_ELEMENTS', 32)
    with torch.no_grad():
        block(x)
    assert len(folded) == 2  # qkv and proj


def test_stochastic_depth_drops_images():
    """Attention and MLP apart, for all tokens of an image alike, and scales what it keeps."""
    block = make(drop_path=0.5).train()
    x = torch.randn(1, 3, 4, 32, dtype=torch.float64)

    def with_kept(attention, mlp):
        a = block.attn.proj(block.attn.attend(block.attn.qkv(block.norm1(x))))
        y = x + attention * a
        return y + mlp * block.mlp(block.norm2(y))

    with torch.no_grad():
        possible = [with_kept(a, m) for a in (0, 2) for m in (0, 2)]
        seen = set()
        for _ in range(20):
            out = block(x.expand(3, -1, -1, -1))
            for image in out:
                found = [i for i, p in enumerate(possible) if torch.allclose(image, p[0])]
                assert len(found) == 1
                seen.update(found)
    assert len(seen) == 4


@pytest.mark.parametrize('training', [True, False])
def test_grid_block_is_timms(training):
    ours = GridBlock(24, 3, 96)
    theirs = Block(24, 3, qkv_bias=True, norm_layer=partial(nn.LayerNorm, eps=1e-6))
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.train(training)
    x = torch.randn(2, 3, 5, 24)
    with torch.set_grad_enabled(training):
        out = ours(x).flatten(1, 2)
        torch.testing.assert_close(out, theirs(x.flatten(1, 2)), atol=1e-5, rtol=1e-5)
