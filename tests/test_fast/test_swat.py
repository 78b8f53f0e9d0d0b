import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mmtoken.fast import optimize_for_cpu, swat, tiling
from mmtoken.layers.swat import structured
from mmtoken.layers.swat.structured import (
    StructuredBlock,
    StructuredMlp,
    StructuredStem,
    StructuredSwinBlock,
)
from mmtoken.runtime.reference import reference_path

STEMS = dict(
    swin=dict(embed_dims=24, patch_size=4, side=2, kernel_size=2, hidden_dims=12, norm=True),
    vit=dict(embed_dims=32, patch_size=8, side=4, kernel_size=4, hidden_dims=12, position=True),
    # As for DeiT-B/32, the second convolution takes 2 x 2 hidden pixels.
    wide=dict(embed_dims=32, patch_size=16, side=4, kernel_size=4, hidden_dims=12, position=True),
)


def swin_block(attn_kernel_size=3, shift=0):
    return StructuredSwinBlock(
        32, 2, side=4, attn_kernel_size=attn_kernel_size, mlp_kernel_size=5, window_size=4,
        shift=shift, shift_always=False, drop_path=0.5,
    )  # fmt: skip


def vit_block(**kwargs):
    return StructuredBlock(32, 2, 48, side=4, mlp_kernel=3, drop_path=0.5, **kwargs)


BLOCKS = {
    'swin': swin_block,
    'swin, shifted': lambda: swin_block(shift=2),
    'swin, plain attention': lambda: swin_block(None),
    'vit': vit_block,
    'vit, no bias': lambda: vit_block(qkv_bias=False),
}


def stir(module):
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    return module.eval()


def check(module, x, tolerance=1e-5):
    """A module with and without tiles, and its input afterwards."""
    before = x.clone()
    with torch.no_grad():
        expected = module(x)
        optimize_for_cpu(module)
        torch.testing.assert_close(module(x), expected, atol=tolerance, rtol=tolerance)
    assert torch.equal(x, before)


@pytest.mark.parametrize('form', STEMS)
@pytest.mark.parametrize('size', [(32, 48), (33, 70), (5, 3)])
@pytest.mark.parametrize('length', [1, 700, 10**6])
def test_tiled_stem_is_the_stem(form, size, length, monkeypatch):
    monkeypatch.setattr(tiling, 'TILE_ELEMENTS', length * 12)
    check(stir(StructuredStem(**STEMS[form])), torch.randn(2, 3, *size))


@pytest.mark.parametrize('kind', BLOCKS)
@pytest.mark.parametrize('length', [1, 30, 10**6])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
def test_tiled_block_is_the_block(kind, length, dtype, monkeypatch):
    """In float32 too, for which kernels are others."""
    monkeypatch.setattr(tiling, 'TILE_ELEMENTS', length * 32)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    check(stir(BLOCKS[kind]()).to(dtype), torch.randn(2, 7, 9, 32, dtype=dtype), tolerance)


@settings(max_examples=50, deadline=None)
@given(
    batch=st.integers(1, 3),
    height=st.integers(1, 12),
    width=st.integers(1, 12),
    kernel_size=st.sampled_from([1, 3, 5]),
    length=st.integers(1, 60),
)
def test_mlp_in_strips_is_that_of_the_whole_grid(batch, height, width, kernel_size, length):
    """Strips of a few rows, and groups of whole images."""
    mlp, norm = StructuredMlp(4, 8, kernel_size), nn.LayerNorm(4)
    x = torch.randn(batch, height, width, 4)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(swat, 'tokens_per_tile', lambda channels: length)
        expected = x + mlp(norm(x))
        y = swat.add_mlp_in_strips(x, norm, mlp)
    assert y is x
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('make', [swin_block, vit_block])
def test_strips_are_for_inference_alone(make, monkeypatch):
    """And for an MLP that they know."""
    calls, strips = [], swat.add_mlp_in_strips
    monkeypatch.setattr(swat, 'add_mlp_in_strips', lambda *a: calls.append(1) or strips(*a))
    block, x = optimize_for_cpu(make().eval()), torch.randn(1, 5, 6, 32)
    block(x)
    with torch.no_grad():
        block.train()(x)
        block.eval()
        with reference_path():
            block(x)
        assert not calls
        block(x)
        assert calls
        block.mlp.dwconv.dilation = (2, 2)
        block.mlp.dwconv.padding = (2 * block.mlp.dwconv.padding[0],) * 2
        block(x)
    assert len(calls) == 1


def test_gelu_in_place():
    x = torch.randn(3, 5)
    expected = F.gelu(x)
    assert swat.gelu_(x) is x
    torch.testing.assert_close(x, expected)


def test_weights_are_folded_once_a_forward(monkeypatch):
    block, x = optimize_for_cpu(vit_block().eval()), torch.randn(1, 5, 7, 32)
    folded, offsets = [], structured.cell_offsets
    monkeypatch.setattr(structured, 'cell_offsets', lambda *a: folded.append(1) or offsets(*a))
    monkeypatch.setattr(tiling, 'TILE_ELEMENTS', 32)
    with torch.no_grad():
        block(x)
    assert len(folded) == 2  # qkv and proj
