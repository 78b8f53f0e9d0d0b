from contextlib import nullcontext

import pytest
import torch
from fake_cuda import CUDA, Calls, fake_cuda

from mmtoken.layers.common import attention as module
from mmtoken.layers.common.attention import (
    attention,
    attention_reference,
    gated_attention,
    gated_attention_fused,
    join_heads,
    split_heads,
    varlen_attention,
    varlen_attention_reference,
    varlen_cross_attention,
    varlen_cross_attention_reference,
)
from mmtoken.runtime.reference import reference_path


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


class Pretended(str):
    """A device that says it is a GPU, but takes tensors to where its text says."""

    type = 'cuda'


class Elsewhere(torch.Tensor):
    """A tensor that says it is on a GPU, so that a CPU runs what is meant for one."""

    device = Pretended('cpu')


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


WAYS = ('chosen', 'reference', 'padded', 'reference path')


def in_one_way(way, fast, reference, tensors, lengths):
    """The reference, or what a function chooses on the CPU, elsewhere, or on the reference path."""
    if way == 'reference':
        return reference(*tensors, lengths)
    if way == 'chosen':
        return fast(*tensors, lengths)
    tensors = [t.as_subclass(Elsewhere) for t in tensors]
    with reference_path() if way == 'reference path' else nullcontext():
        return fast(*tensors, lengths).as_subclass(torch.Tensor)


def assert_same(out, expected, tensors):
    """Values and gradients."""
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=1e-12)
    weights = torch.randn_like(expected)
    grads = [torch.autograd.grad((o * weights).sum(), tensors) for o in (out, expected)]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize('lengths', [[4], [3, 3], [5, 1, 9], [1, 1, 2], [0, 4, 3]])
@pytest.mark.parametrize('way', WAYS)
def test_queries_see_the_keys_of_their_own_image(way, lengths):
    tensors = packed(lengths, dtype=torch.float64)
    expected = one_by_one(*tensors, lengths)
    out = in_one_way(
        way, varlen_cross_attention, varlen_cross_attention_reference, tensors, lengths
    )
    assert_same(out, expected, tensors)


@pytest.mark.parametrize('lengths', [[4], [6, 6], [5, 1, 9]])
def test_ways_to_put_images_together(lengths, monkeypatch):
    """Images of as many queries are a batch, whatever there are otherwise is padded on a GPU."""
    shapes = []

    def spy(query, key, value):
        shapes.append(tuple(query.shape))
        return attention(query, key, value)

    monkeypatch.setattr(module, 'attention', spy)
    for kind in (torch.Tensor, Elsewhere):
        varlen_cross_attention(*(t.as_subclass(kind) for t in packed(lengths)), lengths)
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
    out = module.varlen_kernel(tensors[0], *keys, lengths, key_lengths)
    expected = varlen_cross_attention_reference(*(t.float() for t in tensors), lengths)
    torch.testing.assert_close(out.float(), expected, atol=2e-2, rtol=2e-2)

    monkeypatch.setattr(module, 'varlen_kernel', lambda *args: 'kernel')
    elsewhere = [t.as_subclass(Elsewhere) for t in tensors]
    assert varlen_cross_attention(*elsewhere, lengths) == 'kernel'
    full = varlen_cross_attention(*(t.float() for t in elsewhere), lengths)
    monkeypatch.setattr(module, 'varlen_attn', None)
    for padded in (full, varlen_cross_attention(*elsewhere, lengths)):
        padded = padded.as_subclass(torch.Tensor).float()
        torch.testing.assert_close(padded, expected, atol=2e-2, rtol=2e-2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
def test_ragged_queries_on_a_gpu(dtype):
    lengths = [5, 1, 9]
    tensors = packed(lengths, heads=2)
    expected = one_by_one(*tensors, lengths)
    out = varlen_cross_attention(*(t.to('cuda', dtype) for t in tensors), lengths).cpu().float()
    torch.testing.assert_close(out, expected, atol=2e-2, rtol=2e-2)


# Sequences that attend to themselves


def sequences(lengths, dims=8, **kwargs):
    query, key, value = torch.randn(3, sum(lengths), 3, dims, **kwargs)
    return [t.detach().requires_grad_() for t in (query, key, value)]


def each_sequence(query, key, value, lengths):
    """Query after query, each with a slice of keys."""
    ends = torch.tensor(lengths).cumsum(0).tolist()
    rows = []
    for end, length in zip(ends, lengths, strict=True):
        keys = slice(end - length, end)
        k, v = (t[keys].transpose(0, 1)[None] for t in (key, value))
        rows += [attention_reference(q[None, :, None], k, v)[0, :, 0] for q in query[keys]]
    return torch.stack(rows)


@pytest.mark.parametrize('lengths', [[5], [3, 3], [5, 1, 9], [1, 1, 2], [1]])
@pytest.mark.parametrize('way', WAYS)
def test_packed_tokens_see_their_own_sequence(way, lengths):
    tensors = sequences(lengths, dtype=torch.float64)
    expected = each_sequence(*tensors, lengths)
    out = in_one_way(way, varlen_attention, varlen_attention_reference, tensors, lengths)
    assert_same(out, expected, tensors)


@pytest.mark.parametrize('lengths', [[4], [6, 6], [5, 1, 9]])
def test_ways_to_put_sequences_together(lengths, monkeypatch):
    """Padding is a batch too, in which a bias hides keys that are none."""
    calls = []

    def spy(query, key, value, bias=None):
        calls.append((tuple(query.shape), bias is not None))
        return attention(query, key, value, bias)

    monkeypatch.setattr(module, 'attention', spy)
    for kind in (torch.Tensor, Elsewhere):
        varlen_attention(*(t.as_subclass(kind) for t in sequences(lengths)), lengths)
    together = (len(lengths), 3, max(lengths), 8)
    apart = [((1, 3, length, 8), False) for length in lengths]
    equal = len(set(lengths)) == 1
    assert calls == ([(together, False)] * 2 if equal else [*apart, (together, True)])


def test_half_precision_has_a_kernel_for_packed_sequences(monkeypatch):
    def kernel(query, key, value, ends, key_ends, longest, longest_key):
        """Stood in for by plain arithmetic."""
        assert ends.dtype == torch.int32 and torch.equal(ends, key_ends)
        assert (longest, longest_key) == (9, 9)
        return varlen_attention_reference(query, key, value, ends.diff().tolist())

    lengths = [5, 1, 9]
    tensors = [t.detach() for t in sequences(lengths, dtype=torch.bfloat16)]
    expected = each_sequence(*(t.float() for t in tensors), lengths)
    monkeypatch.setattr(module, 'varlen_attn', kernel)
    out = module.varlen_kernel(*tensors, lengths, lengths)
    torch.testing.assert_close(out.float(), expected, atol=2e-2, rtol=2e-2)

    monkeypatch.setattr(module, 'varlen_kernel', lambda *args: ('kernel', *args[3:]))
    elsewhere = [t.as_subclass(Elsewhere) for t in tensors]
    assert varlen_attention(*elsewhere, lengths) == ('kernel', lengths, lengths)
    full = varlen_attention(*(t.float() for t in elsewhere), lengths)
    monkeypatch.setattr(module, 'varlen_attn', None)
    for padded in (full, varlen_attention(*elsewhere, lengths)):
        padded = padded.as_subclass(torch.Tensor).float()
        torch.testing.assert_close(padded, expected, atol=2e-2, rtol=2e-2)


def some_gate(lengths, share=0.5):
    """Ones and zeros; a one first, for no sequence may lack them."""
    gate = (torch.rand(sum(lengths)) < share).double()
    gate[torch.tensor([0, *lengths[:-1]]).cumsum(0)] = 1
    return gate


@pytest.mark.parametrize('lengths', [[5], [6, 6], [5, 1, 9], [1]])
def test_a_gate_of_0_deletes_a_key(lengths):
    tensors, gate = sequences(lengths, dtype=torch.float64), some_gate(lengths)
    assert sum(lengths) == 1 or 0 < gate.sum() < len(gate)
    out = gated_attention(*tensors, gate, lengths)
    weights = torch.randn_like(out)
    kept = gate > 0
    left = [int(g.sum()) for g in gate.split(lengths)]
    # All queries, among the keys that are left
    rows, start = [], 0
    parts = zip(tensors[0].split(lengths), left, strict=True)
    for query, count in parts:
        keys = slice(start, start + count)
        k, v = (t[kept][keys].transpose(0, 1) for t in tensors[1:])
        rows.append(attention_reference(query.transpose(0, 1), k, v).transpose(0, 1))
        start += count
    expected = torch.cat(rows)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(
        out[kept], varlen_attention(*(t[kept] for t in tensors), left), atol=1e-12, rtol=1e-12
    )
    grads = [torch.autograd.grad((o * weights).sum(), tensors) for o in (out, expected)]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)


def test_a_key_counts_as_often_as_its_gate_says():
    lengths = [4, 3]
    tensors = [t.detach() for t in sequences(lengths, dtype=torch.float64)]
    counts = torch.tensor([2, 0, 1, 3, 1, 4, 0])
    out = gated_attention(*tensors, counts.double(), lengths)
    repeated = [t.repeat_interleave(counts, 0) for t in tensors]
    copies = varlen_attention(*repeated, [6, 5])
    there = counts > 0
    first = (counts.cumsum(0) - counts)[there]
    torch.testing.assert_close(out[there], copies[first], atol=1e-12, rtol=1e-12)


def test_gradient_of_a_gate():
    """What a gate of 0 learns is what its key would have changed."""
    lengths = [5, 1, 6]
    tensors = [t.detach() for t in sequences(lengths, dtype=torch.float64)]
    gate = some_gate(lengths)
    gate[3], gate[8] = 0.3, 1.7
    weights = torch.randn_like(tensors[0])

    def loss(g):
        return (gated_attention(*tensors, g, lengths) * weights).sum()

    leaf = gate.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(leaf), leaf)
    for i in range(len(gate)):
        step = torch.zeros_like(gate)
        step[i] = 1e-6
        # A negative count would be none: from 0 on only upwards.
        slope = (-3 * loss(gate) + 4 * loss(gate + step) - loss(gate + 2 * step)) / 2e-6
        assert grad[i].item() == pytest.approx(slope.item(), abs=1e-7), i
    assert grad[gate == 0].all()
    assert grad[5].item() == pytest.approx(0, abs=1e-12)  # alone in its sequence


@pytest.mark.parametrize('lengths', [[5], [6, 6], [5, 1, 9]])
@pytest.mark.parametrize('dims', [4, 8, 13])
def test_kept_attention_is_gated(lengths, dims):
    tensors = sequences(lengths, dims, dtype=torch.float64)
    weights = torch.randn_like(tensors[0])
    for gate in (torch.ones(sum(lengths)), 0.1 + torch.rand(sum(lengths))):
        leaves = [*tensors, gate.double().requires_grad_()]
        results = []
        for function in (gated_attention, gated_attention_fused):
            out = function(*leaves, lengths)
            assert out.shape == tensors[0].shape
            results.append((out, *torch.autograd.grad((out * weights).sum(), leaves)))
        for kept, gated in zip(*results, strict=True):
            torch.testing.assert_close(kept, gated, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize('lengths', [[7], [4, 9, 1]])
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16])
def test_gated_attention_equals_its_reference(lengths, dtype):
    tensors = [t.detach().to(dtype).requires_grad_() for t in sequences(lengths)]
    gate = some_gate(lengths).to(dtype).requires_grad_()
    weights = torch.randn(tensors[0].shape, dtype=dtype)
    results = []
    for way in (nullcontext, reference_path):
        with way():
            out = gated_attention(*tensors, gate, lengths)
            results.append([out, *torch.autograd.grad((out * weights).sum(), [*tensors, gate])])
    close = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
    for fast, reference in zip(*results, strict=True):
        torch.testing.assert_close(
            fast, reference, atol=close * reference.abs().max().item(), rtol=close
        )


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('gap', [200.0, 1e4])
def test_hidden_keys_may_have_any_score(dtype, gap):
    """Their exponentials must neither be infinite nor drown the others."""
    query = torch.ones(4, 1, 4, dtype=dtype)
    key, value = torch.randn(2, 4, 1, 4, dtype=dtype)
    key[2] = gap / 2  # scores are halved sums of four
    gate = torch.tensor([1.0, 1, 0, 1]).requires_grad_()
    leaves = [t.requires_grad_() for t in (query, key, value)]
    out = gated_attention(*leaves, gate, [4])
    assert out.dtype == dtype
    kept = [0, 1, 3]
    q, k, v = (t.float().transpose(0, 1)[None] for t in (query, key[kept], value[kept]))
    expected = attention_reference(q, k, v)[0].transpose(0, 1)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out.float(), expected, atol=tolerance, rtol=tolerance)
    for grad in torch.autograd.grad(out.float().square().sum(), [*leaves, gate]):
        assert grad.isfinite().all()


def test_keys_that_count_may_have_low_scores():
    """Far below those of hidden keys, and far apart from each other."""
    query, value = torch.ones(3, 1, 1), torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1)
    key = torch.tensor([-500.0, -800.0, 900.0]).view(3, 1, 1)
    out = gated_attention(query, key, value, torch.tensor([1.0, 1.0, 0.0]), [3])
    assert out.flatten().tolist() == [1, 1, 1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
def test_packed_sequences_on_a_gpu(dtype):
    lengths = [5, 1, 9]
    tensors, gate = sequences(lengths), 0.1 + torch.rand(sum(lengths))
    expected = [each_sequence(*tensors, lengths), gated_attention(*tensors, gate, lengths)]
    there = [t.detach().to('cuda', dtype).requires_grad_() for t in tensors]
    gate = gate.to('cuda').requires_grad_()
    outs = [varlen_attention(*there, lengths), gated_attention_fused(*there, gate, lengths)]
    for out, theirs in zip(outs, expected, strict=True):
        torch.testing.assert_close(out.cpu().float(), theirs, atol=3e-2, rtol=3e-2)
    for grad in torch.autograd.grad(outs[1].float().square().sum(), [*there, gate]):
        assert grad.isfinite().all() and grad.abs().sum() > 0


# Which kernel a GPU would run


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize('lengths', [[6, 6], [5, 1, 9]])
def test_kernels_on_a_gpu(dtype, lengths, monkeypatch):
    kernels = []

    def kernel(query, key, value, ends, key_ends, longest, most_keys):
        kernels.append((longest, most_keys))
        for bounds in (ends, key_ends):
            assert bounds.shape == (len(lengths) + 1,) and bounds.dtype == torch.int32
            assert bounds.device == query.device
        return torch.empty_like(query)

    monkeypatch.setattr(module, 'varlen_attn', kernel)
    with fake_cuda(monkeypatch):
        query = torch.empty(sum(lengths), 3, 8, device=CUDA, dtype=dtype)
        keys = torch.empty(len(lengths), 3, 7, 8, device=CUDA, dtype=dtype)
        with Calls() as calls:
            outs = [
                varlen_attention(query, query, query, lengths),
                varlen_cross_attention(query, keys, keys, lengths),
            ]
    for out in outs:
        assert (out.shape, out.dtype, out.device) == (query.shape, dtype, query.device)
    packed = len(lengths) == 3 and dtype != torch.float32
    assert kernels == ([(9, 9), (9, 7)] if packed else [])
    assert calls.names['scaled_dot_product_attention'] == (0 if packed else 2)
    assert not {'bmm', 'matmul', '__matmul__', 'softmax'} & calls.names.keys()


@pytest.mark.parametrize('biased', [False, True])
def test_bfloat16_products_on_some_cpus(biased, monkeypatch):
    """As exact as bfloat16 is, and not where the scores would be too many or trained."""
    used = []

    def spy(*args):
        used.append(True)
        return attention_reference(*args)

    monkeypatch.setattr(module, 'has_bfloat16_products', lambda: True)
    monkeypatch.setattr(module, 'attention_reference', spy)
    query, key, value = (torch.randn(3, 2, 49, 32) for _ in range(3))
    bias = torch.randn(1, 2, 49, 49) if biased else None
    wanted = attention(query, key, value, bias)
    assert not used  # float32
    half = [t.bfloat16() for t in (query, key, value)]
    got = attention(*half, bias)
    assert used and got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), wanted, atol=0.05, rtol=0.05)
    used.clear()
    attention(half[0].requires_grad_(), *half[1:], bias)
    monkeypatch.setattr(module, 'MAX_SCORE_BYTES', 2 * 3 * 2 * 49 * 49 - 1)
    attention(*(t.detach() for t in half), bias)
    assert not used
