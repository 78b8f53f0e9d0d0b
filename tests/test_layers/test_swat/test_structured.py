"""Layers and blocks on structure-aware tokens, against the release and their references."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mmtoken.layers.common.attention import attention, join_heads
from mmtoken.layers.common.swin import SwinBlock
from mmtoken.layers.common.vit import full_attention
from mmtoken.layers.swat.structured import (
    StructuredBlock,
    StructuredLinear,
    StructuredMerging,
    StructuredMlp,
    StructuredStem,
    StructuredSwinBlock,
)
from mmtoken.runtime.reference import reference_path

GOLDEN = np.load(Path(__file__).parents[2] / 'data' / 'swat_ops_golden.npz')
PATHS = dict(fast=torch.no_grad, reference=reference_path, training=torch.enable_grad)
STEM_PARTS = dict(c1='conv1', nm='norm1', c2='conv2', no='norm2', pos='plane_pos')
SWIN = dict(embed_dims=24, patch_size=4, side=2, kernel_size=2, hidden_dims=12, norm=True)
VIT = dict(embed_dims=32, patch_size=8, side=4, kernel_size=4, hidden_dims=12, position=True)
# As for DeiT-B/32, the second convolution takes 2 x 2 hidden pixels.
WIDE = dict(embed_dims=32, patch_size=16, side=4, kernel_size=4, hidden_dims=12, position=True)
FORMS = dict(swin=SWIN, vit=VIT, wide=WIDE)
BLOCK_PARTS = {
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


def golden(name):
    return torch.from_numpy(GOLDEN[name])


def load(layer, start, names):
    """Give a layer the weights of a golden case: ``names`` are theirs, by ours."""
    weights = {}
    for ours, theirs in names.items():
        for kind in ('weight', 'bias'):
            value = golden(f'{start}.{theirs}.{kind}')
            # The release has 1 x 1 convolutions for Linear layers.
            weights[f'{ours}.{kind}'] = value.flatten(1) if value.shape[2:] == (1, 1) else value
    layer.double().load_state_dict(weights)
    return layer.eval()


def golden_projections(start):
    qkv, proj = StructuredLinear(32, 96, 4, 3), StructuredLinear(32, 32, 4, 3)
    return (
        load(qkv, start, {'linear': 'ql', 'conv': 'qc'}),
        load(proj, start, {'linear': 'pl', 'conv': 'pc'}),
    )


def attend(x, qkv, proj, num_heads):
    query, key, value = qkv(x).unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
    return proj(join_heads(attention(query, key, value)))


@pytest.mark.parametrize('path', PATHS)
@pytest.mark.parametrize('num_heads', [2, 4])
def test_projections_equal_the_release(num_heads, path):
    case = f'attn_h{num_heads}'
    with PATHS[path]():
        y = attend(golden(f'{case}.x'), *golden_projections(f'{case}.w'), num_heads)
    torch.testing.assert_close(y, golden(f'{case}.y'), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize('path', PATHS)
def test_layers_of_a_vit_block_equal_the_release(path):
    norm1, norm2 = nn.LayerNorm(32, 1e-6), nn.LayerNorm(32, 1e-6)
    both = load(nn.ModuleList([norm1, norm2]), 'vitblk.w', {'0': 'n1', '1': 'n2'})
    projections = golden_projections('vitblk.w.at')
    mlp = load(StructuredMlp(32, 128, 5), 'vitblk.w.ml', {'fc1': 'f1', 'fc2': 'f2', 'dwconv': 'dw'})
    with PATHS[path]():
        x = golden('vitblk.x')
        x = (x + attend(both[0](x), *projections, num_heads=2)).view(2, 3, 4, 32)
        x = x + mlp(both[1](x))
    torch.testing.assert_close(x.flatten(1, 2), golden('vitblk.y'), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize('side, kernel_size', [(2, 1), (4, 3), (3, 5), (1, 3)])
@pytest.mark.parametrize('bias', [True, False])
def test_folded_projection_equals_the_plain_one(side, kernel_size, bias):
    layer = StructuredLinear(3 * side**2, 6 * side**2, side, kernel_size, bias).double()
    assert (layer.joint_weight()[1] is None) == (not bias)
    x = torch.randn(2, 5, 3 * side**2, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 5, 6 * side**2, dtype=torch.float64)
    results = []
    for forward in (layer, layer.forward_reference):
        y = forward(x)
        inputs = (x, *layer.parameters())
        results.append((y, *torch.autograd.grad((y * weight).sum(), inputs)))
    for fast, reference in zip(*results, strict=True):
        torch.testing.assert_close(fast, reference, atol=1e-9, rtol=1e-9)


def test_mlp_equals_the_release():
    mlp = load(StructuredMlp(8, 24, 5), 'cmlp.w', {'fc1': 'f1', 'fc2': 'f2', 'dwconv': 'dw'})
    y = mlp(golden('cmlp.x').permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    torch.testing.assert_close(y, golden('cmlp.y'), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize('path', PATHS)
def test_merging_equals_the_release(path):
    merging = StructuredMerging(16, side=2, kernel_size=3).double().eval()
    names = {'norm.weight': 'norm_w', 'norm.bias': 'norm_b', 'reduction.weight': 'conv_w'}
    merging.load_state_dict({ours: golden(f'merge.{theirs}') for ours, theirs in names.items()})
    with PATHS[path]():
        y = merging(golden('merge.x').view(2, 4, 6, 16)).flatten(1, 2)
    torch.testing.assert_close(y, golden('merge.y'), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize('case, arguments', [('tokswin', SWIN), ('tokvit', VIT)])
def test_stem_equals_the_release(case, arguments):
    start = f'{case}.w.'
    state = {}
    for name in GOLDEN:
        if name.startswith(start):
            part, *kind = name.removeprefix(start).split('.')
            state['.'.join([STEM_PARTS[part], *kind])] = golden(name)
    stem = StructuredStem(**arguments).double().eval()
    stem.load_state_dict(state)
    with torch.no_grad():
        tokens = stem(golden('tokvit.x'))
    assert tuple(tokens.shape[1:3]) == tuple(golden(f'{case}.hw'))
    torch.testing.assert_close(tokens.flatten(1, 2), golden(f'{case}.y'), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('size', [(32, 48), (33, 70), (5, 3)])
def test_stem_accepts_any_size(form, size):
    stem = StructuredStem(**FORMS[form])
    grid = (-(-side // stem.patch_size) for side in size)
    assert stem(torch.zeros(2, 3, *size)).shape == (2, *grid, FORMS[form]['embed_dims'])


@pytest.mark.parametrize('name', ['vit', 'wide'])
def test_position_has_the_period_of_a_token(name):
    """So an image that is moved by whole patches gives moved tokens."""
    stem = StructuredStem(**FORMS[name]).eval()
    p = stem.patch_size
    torch.nn.init.normal_(stem.plane_pos)
    image = torch.randn(1, 3, 6 * p, 6 * p)
    tokens = stem(image)
    moved = stem(image[:, :, p:, 2 * p :])
    # The first row and column see padding in place of pixels.
    torch.testing.assert_close(moved[:, 1:, 1:], tokens[:, 2:, 3:])
    assert not torch.allclose(stem(image.roll(p // 2, 3))[:, :, 2:], tokens[:, :, 2:], atol=0.1)


def test_channels_are_planes_in_row_major_order():
    """A token's channel (plane, row, column) depends on the cell's pixels alone."""
    stem = StructuredStem(**SWIN).eval()
    stem.norm2 = torch.nn.Identity()
    image = torch.randn(1, 3, 8, 8)
    changed = image.clone()
    changed[:, :, 6:8, 4:6] += 1  # row 1, column 0 of token (1, 1)
    difference = (stem(changed) - stem(image)).abs()[0]
    assert difference[1, 1].view(6, 2, 2).gt(1e-4).any(0).tolist() == [
        [False, False],
        [True, False],
    ]
    difference[1, 1] = 0
    assert difference.max() < 1e-6


def test_stem_in_half_precision():
    stem = StructuredStem(**VIT).eval()
    image = torch.randn(1, 3, 40, 40)
    with torch.no_grad():
        full = stem(image)
        with torch.autocast('cpu', dtype=torch.bfloat16):
            half = stem(image)
    assert (half - full).abs().mean() < 0.02 * full.abs().mean()


def make_swin_block(attn_kernel_size, shift):
    block = StructuredSwinBlock(
        32,
        num_heads=2,
        side=4,
        attn_kernel_size=attn_kernel_size,
        mlp_kernel_size=5,
        window_size=4,
        shift=shift,
        shift_always=False,
    ).double()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.2)
    return block.eval()


@pytest.mark.parametrize('attn_kernel_size', [3, None])
@pytest.mark.parametrize('shift', [0, 2])
@pytest.mark.parametrize('grid', [(8, 12), (7, 9), (3, 5)])
def test_swin_block_equals_its_reference(attn_kernel_size, shift, grid):
    block = make_swin_block(attn_kernel_size, shift)
    kind = nn.Linear if attn_kernel_size is None else StructuredLinear
    assert isinstance(block.attn.qkv, kind) and isinstance(block.attn.proj, kind)
    x = torch.randn(2, *grid, 32, dtype=torch.float64, requires_grad=True)
    weight = torch.randn_like(x)

    def outcome():
        y = block(x)
        return y, *torch.autograd.grad((y * weight).sum(), (x, *block.parameters()))

    training = outcome()
    with reference_path():
        reference = outcome()
    for a, b in zip(training, reference, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)
    before = x.detach().clone()
    with torch.no_grad():
        torch.testing.assert_close(block(x), reference[0].detach(), atol=1e-9, rtol=1e-9)
    assert torch.equal(x, before)


@pytest.mark.parametrize('shift', [0, 2])
def test_attention_without_convolutions_is_that_of_swin(shift):
    """A layer is the mean of its two parts: twice the weights, and nothing inside the tokens."""
    plain = SwinBlock(32, 2, window_size=4, shift=shift, shift_always=False).double()
    nn.init.uniform_(plain.attn.qkv.bias)
    block = make_swin_block(3, shift)
    block.norm1.load_state_dict(plain.norm1.state_dict())
    weights = {'relative_position_bias_table': plain.attn.relative_position_bias_table}
    for name in ('qkv', 'proj'):
        layer = getattr(plain.attn, name)
        for kind in ('weight', 'bias'):
            weights[f'{name}.linear.{kind}'] = 2 * getattr(layer, kind)
            conv = getattr(getattr(block.attn, name).conv, kind)
            weights[f'{name}.conv.{kind}'] = torch.zeros_like(conv)
    block.attn.load_state_dict(weights)
    x = torch.randn(2, 7, 9, 32, dtype=torch.float64)
    torch.testing.assert_close(block.attend(block.norm1(x)), plain.attend(plain.norm1(x)))


def make_vit_block(**kwargs):
    block = StructuredBlock(32, 2, 48, side=4, mlp_kernel=3, **kwargs).double()
    for name, parameter in block.named_parameters():
        nn.init.normal_(parameter, std=0.3)
        if 'norm' in name and name.endswith('weight'):
            nn.init.normal_(parameter, 1, 0.1)
    return block


def test_vit_block_equals_the_release():
    state = {}
    for name in GOLDEN:
        if name.startswith('vitblk.w.'):
            part, _, kind = name.removeprefix('vitblk.w.').rpartition('.')
            linear = part in ('ml.f1', 'ml.f2') and kind == 'weight'
            weight = golden(name)
            state[f'{BLOCK_PARTS[part]}.{kind}'] = weight.flatten(1) if linear else weight
    block = StructuredBlock(32, 2, 128, side=4).double().eval()
    block.load_state_dict(state)
    x = golden('vitblk.x').unflatten(1, (3, 4))
    outs = [block(x)]
    with torch.no_grad():
        outs.append(block(x))
        with reference_path():
            outs.append(block(x))
    for out in outs:
        torch.testing.assert_close(out.flatten(1, 2), golden('vitblk.y'), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize('grid', [(5, 7), (1, 1), (2, 9)])
@pytest.mark.parametrize('qkv_bias', [True, False])
def test_vit_block_equals_its_reference(grid, qkv_bias):
    block = make_vit_block(qkv_bias=qkv_bias).train()
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


def test_stochastic_depth_drops_images():
    """Attention and MLP apart, for all tokens of an image alike, and scales what it keeps."""
    block = make_vit_block(drop_path=0.5).train()
    x = torch.randn(1, 3, 4, 32, dtype=torch.float64)

    def with_kept(attention, mlp):
        a = block.attn(block.norm1(x), full_attention)
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
