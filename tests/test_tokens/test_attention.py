import pytest
import torch

from mmtoken.tokens import attention as module
from mmtoken.tokens.attention import (
    attention,
    attention_reference,
    join_heads,
    ragged_attention,
    ragged_attention_reference,
    split_heads,
)
from mmtoken.tokens.reference import reference_path


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


class Elsewhere(torch.Tensor):
    """A tensor that says it is on a GPU, so that a CPU runs what is meant for one."""

    device = torch.device('cuda')


def packed(lengths, keys=7, heads=3, **kwargs):
    query = torch.randn(sum(lengths), heads, 8, **kwargs)
    key, value = torch.randn(2, len(lengths), heads, keys, 8, **kwargs)
    return [t.detach().requires_grad_() for t in (query, key, value)]


def one_by_one(query, key, value, lengths):
    """Query after query."""
    images = [i for i, length in enumerate(lengths) for _ in range(length)]
    rows = [
        attention_reference(q[None, :, None], key[i, None], value[i, None])[0, :, 0]
        for i, q in zip(images, query, strict=True)
    ]
    return torch.stack(rows)


@pytest.mark.parametrize('lengths', [[4], [3, 3], [5, 1, 9], [1, 1, 2], [0, 4, 3]])
@pytest.mark.parametrize('way', ['chosen', 'reference', 'padded', 'reference path'])
def test_queries_see_the_keys_of_their_own_image(way, lengths):
    tensors = packed(lengths, dtype=torch.float64)
    expected = one_by_one(*tensors, lengths)
    if way == 'reference':
        out = ragged_attention_reference(*tensors, lengths)
    elif way == 'padded':
        out = ragged_attention(*(t.as_subclass(Elsewhere) for t in tensors), lengths)
    elif way == 'reference path':
        with reference_path():
            out = ragged_attention(*(t.as_subclass(Elsewhere) for t in tensors), lengths)
    else:
        out = ragged_attention(*tensors, lengths)
    out = out.as_subclass(torch.Tensor)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=1e-12)
    weights = torch.randn_like(expected)
    grads = [torch.autograd.grad((o * weights).sum(), tensors) for o in (out, expected)]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize('lengths', [[4], [6, 6], [5, 1, 9]])
def test_ways_to_put_images_together(lengths, monkeypatch):
    """Images of as many queries are a batch, whatever there are otherwise is padded on a GPU."""
    shapes = []

    def spy(query, key, value):
        shapes.append(tuple(query.shape))
        return attention(query, key, value)

    monkeypatch.setattr(module, 'attention', spy)
    for kind in (torch.Tensor, Elsewhere):
        ragged_attention(*(t.as_subclass(kind) for t in packed(lengths)), lengths)
    together = (len(lengths), 3, max(lengths), 8)
    apart = [(1, 3, length, 8) for length in lengths]
    assert shapes == ([together] * 2 if len(set(lengths)) == 1 else [*apart, together])


def test_half_precision_has_a_kernel_for_ragged_queries(monkeypatch):
    """Stood in for by plain arithmetic."""

    def kernel(query, key, value, ends, key_ends, longest, num_keys):
        assert ends.dtype == key_ends.dtype == torch.int32
        assert (longest, num_keys) == (9, 7)
        out = []
        for i in range(3):
            q, k, v = (
                t[e[i] : e[i + 1]].transpose(0, 1)
                for t, e in ((query, ends), (key, key_ends), (value, key_ends))
            )
            out.append(attention_reference(q, k, v).transpose(0, 1))
        return torch.cat(out)

    monkeypatch.setattr(module, 'varlen_attn', kernel)
    lengths = [5, 1, 9]
    tensors = [t.detach() for t in packed(lengths, dtype=torch.bfloat16)]
    key_lengths = [tensors[1].shape[2]] * len(lengths)
    keys = [t.transpose(1, 2).flatten(0, 1) for t in tensors[1:]]
    out = module._varlen_attention(tensors[0], *keys, lengths, key_lengths)
    expected = ragged_attention_reference(*(t.float() for t in tensors), lengths)
    torch.testing.assert_close(out.float(), expected, atol=2e-2, rtol=2e-2)

    monkeypatch.setattr(module, '_varlen_attention', lambda *args: 'kernel')
    elsewhere = [t.as_subclass(Elsewhere) for t in tensors]
    assert ragged_attention(*elsewhere, lengths) == 'kernel'
    full = ragged_attention(*(t.float() for t in elsewhere), lengths)
    monkeypatch.setattr(module, 'varlen_attn', None)
    for padded in (full, ragged_attention(*elsewhere, lengths)):
        padded = padded.as_subclass(torch.Tensor).float()
        torch.testing.assert_close(padded, expected, atol=2e-2, rtol=2e-2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
def test_ragged_queries_on_a_gpu(dtype):
    lengths = [5, 1, 9]
    tensors = packed(lengths, heads=2)
    expected = one_by_one(*tensors, lengths)
    out = ragged_attention(*(t.to('cuda', dtype) for t in tensors), lengths).cpu().float()
    torch.testing.assert_close(out, expected, atol=2e-2, rtol=2e-2)
