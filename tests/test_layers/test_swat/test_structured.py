from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mmtoken.layers.common.attention import attention, join_heads
from mmtoken.layers.swat import structured
from mmtoken.layers.swat.structured import StructuredLinear, StructuredMerging, StructuredMlp
from mmtoken.runtime.reference import reference_path

GOLDEN = np.load(Path(__file__).parents[2] / 'data' / 'swat_ops_golden.npz')
PATHS = dict(fast=torch.no_grad, reference=reference_path, training=torch.enable_grad)


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
        x = mlp.add_in_strips(x, both[1]) if path == 'fast' else x + mlp(both[1](x))
    torch.testing.assert_close(x.flatten(1, 2), golden('vitblk.y'), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize('side, kernel_size', [(2, 1), (4, 3), (3, 5), (1, 3)])
@pytest.mark.parametrize('bias', [True, False])
def test_folded_projection_equals_the_plain_one(side, kernel_size, bias):
    layer = StructuredLinear(3 * side**2, 6 * side**2, side, kernel_size, bias).double()
    assert (layer.bias is None) == (not bias)
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


@settings(max_examples=50, deadline=None)
@given(
    batch=st.integers(1, 3),
    height=st.integers(1, 12),
    width=st.integers(1, 12),
    kernel_size=st.sampled_from([1, 3, 5]),
    length=st.integers(1, 60),
)
def test_mlp_in_strips_is_that_of_the_whole_grid(batch, height, width, kernel_size, length):
    """Strips of a few rows, and groups of whole images; in fp32, which has kernels of its own."""
    mlp, norm = StructuredMlp(4, 8, kernel_size), nn.LayerNorm(4)
    x = torch.randn(batch, height, width, 4)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(structured, 'tile_length', lambda channels: length)
        expected = x + mlp(norm(x))
        y = mlp.add_in_strips(x, norm)
    assert y is x
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('path', PATHS)
def test_merging_equals_the_release(path):
    merging = StructuredMerging(16, side=2, kernel_size=3).double().eval()
    names = {'norm.weight': 'norm_w', 'norm.bias': 'norm_b', 'reduction.weight': 'conv_w'}
    merging.load_state_dict({ours: golden(f'merge.{theirs}') for ours, theirs in names.items()})
    with PATHS[path]():
        y = merging(golden('merge.x').view(2, 4, 6, 16)).flatten(1, 2)
    torch.testing.assert_close(y, golden('merge.y'), atol=1e-9, rtol=1e-9)


@settings(max_examples=50, deadline=None)
@given(
    batch=st.integers(1, 2),
    height=st.integers(1, 12),
    width=st.integers(1, 8),
    side=st.sampled_from([1, 2, 4]),
    kernel_size=st.sampled_from([1, 3, 5, 9]),
    length=st.integers(1, 60),
)
def test_merging_in_strips_is_that_of_the_whole_grid(
    batch, height, width, side, kernel_size, length
):
    """Convolutions that reach beyond the neighbouring token as well."""
    merging = StructuredMerging(2 * side**2, side, kernel_size).eval()
    nn.init.uniform_(merging.norm.bias)
    x = torch.randn(batch, height, width, 2 * side**2)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(structured, 'tile_length', lambda channels: length)
        fast = merging(x)
        with reference_path():
            reference = merging(x)
    assert fast.shape == (batch, -(-height // 2), -(-width // 2), 4 * side**2)
    torch.testing.assert_close(fast, reference, atol=1e-5, rtol=1e-5)
