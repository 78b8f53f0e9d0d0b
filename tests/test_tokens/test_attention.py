import pytest
import torch

from mmtoken.tokens.attention import attention, attention_reference, join_heads, split_heads


@pytest.mark.parametrize('biased', [False, True])
def test_fused_equals_reference(biased):
    query, key, value = (
        torch.randn(2, 3, n, 8, dtype=torch.float64, requires_grad=True) for n in (5, 7, 7)
    )
    bias = None
    if biased:
        bias = torch.randn(2, 1, 5, 7, dtype=torch.float64)
        bias[..., 4] = float('-inf')
    outs = [f(query, key, value, bias) for f in (attention, attention_reference)]
    torch.testing.assert_close(*outs, atol=1e-12, rtol=1e-12)
    grads = [torch.autograd.grad(o.square().sum(), (query, key, value)) for o in outs]
    for fused, reference in zip(*grads, strict=True):
        torch.testing.assert_close(fused, reference, atol=1e-12, rtol=1e-12)


def test_heads_split_and_join():
    x = torch.randn(2, 5, 12)
    heads = split_heads(x, 3)
    assert heads.shape == (2, 3, 5, 4)
    assert torch.equal(heads[:, 1], x[..., 4:8])
    assert torch.equal(join_heads(heads), x)
