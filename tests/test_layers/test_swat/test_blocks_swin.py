import pytest
import torch
from torch import nn

from mmtoken.layers.common.swin import SwinBlock
from mmtoken.layers.swat.blocks import StructuredSwinBlock
from mmtoken.layers.swat.structured import StructuredLinear
from mmtoken.runtime.reference import reference_path

DIMS = 32


def make_block(attn_kernel_size, shift):
    block = StructuredSwinBlock(
        DIMS,
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
def test_fast_path_equals_reference(attn_kernel_size, shift, grid):
    block = make_block(attn_kernel_size, shift)
    kind = nn.Linear if attn_kernel_size is None else StructuredLinear
    assert isinstance(block.attn.qkv, kind) and isinstance(block.attn.proj, kind)
    x = torch.randn(2, *grid, DIMS, dtype=torch.float64, requires_grad=True)
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
    plain = SwinBlock(DIMS, 2, window_size=4, shift=shift, shift_always=False).double()
    nn.init.uniform_(plain.attn.qkv.bias)
    block = make_block(3, shift)
    block.norm1.load_state_dict(plain.norm1.state_dict())
    weights = {'relative_position_bias_table': plain.attn.relative_position_bias_table}
    for name in ('qkv', 'proj'):
        layer = getattr(plain.attn, name)
        for kind in ('weight', 'bias'):
            weights[f'{name}.linear.{kind}'] = 2 * getattr(layer, kind)
            conv = getattr(getattr(block.attn, name).conv, kind)
            weights[f'{name}.conv.{kind}'] = torch.zeros_like(conv)
    block.attn.load_state_dict(weights)
    x = torch.randn(2, 7, 9, DIMS, dtype=torch.float64)
    torch.testing.assert_close(block.attend(block.norm1(x)), plain.attend(plain.norm1(x)))
