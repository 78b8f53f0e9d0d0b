"""Scaled dot-product attention: the single entry point of the package.

Every attention calls :func:`attention`, so kernels are chosen, counted and tested in one place.
:func:`attention_reference` is the same in plain arithmetic.
"""

from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ...runtime.reference import is_compiling, on_reference_path
from ...runtime.torch_private import has_bfloat16_products

# The scores of hidden keys may be so much larger that exp() would overflow.
MAX_EXPONENT = 60.0
MAX_SCORE_BYTES = 64 * 2**20  # of a call that keeps its scores
CHANNEL_MULTIPLE = 8  # of the channels of a head, for fused kernels

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch before 2.10
    varlen_attn = None


def attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """Softmax attention with torch's fused kernels.

    Args:
        query: ``(B, heads, Q, d)``.
        key, value: ``(B, heads, K, d)``.
        bias: Added to the scaled scores; broadcasts to ``(B, heads, Q, K)``. Minus infinity hides
            a key; a query must keep at least one.

    Returns:
        ``(B, heads, Q, d)``.
    """
    # With a learned bias torch has no fused kernel on a CPU; its fallback is slower than products.
    if query.device.type == 'cpu' and (is_learned(bias) or prefers_products(query, key)):
        return attention_reference(query, key, value, bias)
    # Operation counters that read a trace know matrix products, but not the fused operator. ONNX
    # has none that keeps the strides of a CPU's, which are part of what torch exports.
    if torch.jit.is_tracing() or torch.onnx.is_in_onnx_export():
        return attention_reference(query, key, value, bias)
    if bias is not None:
        bias = bias.to(query.dtype)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias)


def is_learned(bias: Tensor | None) -> bool:
    """Whether a bias needs a gradient; torch.compile, which cannot ask, has kernels of its own."""
    return bias is not None and not is_compiling() and bias.requires_grad


def prefers_products(query: Tensor, key: Tensor) -> bool:
    """Whether products of matrices are faster than torch's fused kernel, without gradients.

    In bfloat16 on CPUs with AVX-512 they take half to three quarters of its time, for windows, for
    few queries or keys, and for a whole ViT of 1,750 tokens (torch 2.11, AMD EPYC). Products keep
    all scores, in bfloat16, so not where there are too many.
    """
    if query.dtype != torch.bfloat16 or query.requires_grad or is_compiling():
        return False
    scores = query.shape[:-1].numel() * key.shape[-2]
    return scores * query.element_size() <= MAX_SCORE_BYTES and has_bfloat16_products()


def attention_reference(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None
) -> Tensor:
    """:func:`attention`, written out."""
    return attention_map(query, key, bias) @ value


def attention_map(query: Tensor, key: Tensor, bias: Tensor | None = None) -> Tensor:
    """``softmax(q k^T / sqrt(d) + bias)``: ``(..., Q, d), (..., K, d) -> (..., Q, K)``."""
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    if bias is not None:
        scores = scores + bias.to(query.dtype)
    return scores.softmax(dim=-1)


def cross_attention(
    query: Tensor, key_value: Tensor, num_heads: int, bias: Tensor | None = None
) -> Tensor:
    """:func:`attention` of projected tokens, ``(B, Q, C), (B, K, 2 * C) -> (B, Q, C)``."""
    key, value = key_value.chunk(2, dim=-1)
    heads = (split_heads(t, num_heads) for t in (query, key, value))
    return join_heads(attention(*heads, bias))


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """``(B, L, heads * d) -> (B, heads, L, d)``. Inverse: :func:`join_heads`."""
    batch, length, channels = x.shape
    return x.view(batch, length, num_heads, channels // num_heads).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """``(B, heads, L, d) -> (B, L, heads * d)``. Inverse: :func:`split_heads`."""
    return x.transpose(1, 2).flatten(2)


def varlen_cross_attention(query: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> Tensor:
    """Attention of packed queries, each to the keys of its own image.

    Every image has equally many keys, so no mask is needed when images are batched.
    :func:`varlen_cross_attention_reference` does the same image by image.

    Args:
        query: ``(M, heads, d)``, image after image.
        key, value: ``(B, heads, K, d)``.
        lengths: Queries of each image, adding up to M.

    Returns:
        ``(M, heads, d)``.
    """
    if len(lengths) == 1 or len(set(lengths)) == 1:  # symbols of torch.export have no hash
        query = query.unflatten(0, (len(lengths), -1)).transpose(1, 2)
        return attention(query, key, value).transpose(1, 2).flatten(0, 1)
    if query.device.type == 'cpu' or on_reference_path():
        return varlen_cross_attention_reference(query, key, value, lengths)
    if _has_varlen_kernel(query):
        keys = [key.shape[2]] * len(lengths)
        key, value = (t.transpose(1, 2).flatten(0, 1) for t in (key, value))
        return varlen_kernel(query, key, value, lengths, keys)
    out = attention(_pad(query, lengths), key, value)
    return _unpad(out, lengths)


def varlen_cross_attention_reference(
    query: Tensor, key: Tensor, value: Tensor, lengths: list[int]
) -> Tensor:
    """:func:`varlen_cross_attention`, image by image; on a CPU also the fastest form."""
    out = []
    for image, q in enumerate(query.split(lengths)):
        k, v = key[image : image + 1], value[image : image + 1]
        out.append(attention(q.transpose(0, 1)[None], k, v)[0].transpose(0, 1))
    return torch.cat(out)


def varlen_attention(query: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> Tensor:
    """Attention inside each of several sequences that are packed one after another.

    :func:`varlen_attention_reference` does the same sequence by sequence.

    Args:
        query, key, value: ``(M, heads, d)``.
        lengths: Tokens of each sequence, adding up to M.

    Returns:
        ``(M, heads, d)``.
    """
    if len(lengths) == 1 or len(set(lengths)) == 1:  # symbols of torch.export have no hash
        packed = (query, key, value)
        q, k, v = (t.unflatten(0, (len(lengths), -1)).transpose(1, 2) for t in packed)
        return attention(q, k, v).transpose(1, 2).flatten(0, 1)
    if query.device.type == 'cpu' or on_reference_path():
        return varlen_attention_reference(query, key, value, lengths)
    if _has_varlen_kernel(query):
        return varlen_kernel(query, key, value, lengths, lengths)
    return varlen_attention_padded(query, key, value, lengths)


def varlen_attention_padded(
    query: Tensor, key: Tensor, value: Tensor, lengths: list[int]
) -> Tensor:
    """:func:`varlen_attention` of a batch padded to the longest sequence."""
    ones = torch.ones(sum(lengths), dtype=torch.bool).split(lengths)
    real = pad_sequence(ones, batch_first=True).to(query.device, non_blocking=True)
    bias = torch.zeros_like(real, dtype=query.dtype).masked_fill_(~real, float('-inf'))
    out = attention(*(_pad(t, lengths) for t in (query, key, value)), bias[:, None, None])
    return _unpad(out, lengths)


def varlen_attention_reference(
    query: Tensor, key: Tensor, value: Tensor, lengths: list[int]
) -> Tensor:
    """:func:`varlen_attention`, sequence by sequence; on a CPU also the fastest form."""
    out = []
    for packed in zip(*(t.split(lengths) for t in (query, key, value)), strict=True):
        q, k, v = (t.transpose(0, 1)[None] for t in packed)
        out.append(attention(q, k, v)[0].transpose(0, 1))
    return torch.cat(out)


def gated_attention(
    query: Tensor, key: Tensor, value: Tensor, gate: Tensor, lengths: list[int]
) -> Tensor:
    """:func:`varlen_attention` in which each key counts ``gate`` times.

    Weights become ``exp(s_ij) gate_j / sum_n exp(s_in) gate_n``: a key whose gate is 0 has no
    effect, but its gate still has a gradient. :func:`gated_attention_reference` is the same in
    plain arithmetic.

    Args:
        query, key, value: ``(M, heads, d)``.
        gate: ``(M,)``, 0 or more; not 0 for all keys of a sequence.
        lengths: Tokens of each sequence, adding up to M.

    Returns:
        ``(M, heads, d)``.
    """
    attend = gated_attention_reference if on_reference_path() else _GatedAttention.apply
    out = []
    for *packed, g in zip(*(t.split(lengths) for t in (query, key, value, gate)), strict=True):
        q, k, v = (t.transpose(0, 1) for t in packed)
        out.append(attend(q, k, v, g).transpose(0, 1))
    return torch.cat(out)


def gated_attention_reference(query: Tensor, key: Tensor, value: Tensor, gate: Tensor) -> Tensor:
    """:func:`gated_attention` of one sequence, written out.

    Args:
        query, key, value: ``(heads, L, d)``.
        gate: ``(L,)``.

    Returns:
        ``(heads, L, d)``.
    """
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    weights = _stable_exp(scores, gate)
    return (weights * gate / (weights * gate).sum(dim=-1, keepdim=True)).to(value.dtype) @ value


def _stable_exp(scores: Tensor, gate: Tensor) -> Tensor:
    """Exponentials of scores, relative to the highest score of a key that is not hidden."""
    if scores.dtype in (torch.float16, torch.bfloat16):
        scores = scores.float()
    highest = scores.detach().masked_fill(gate == 0, float('-inf')).amax(dim=-1, keepdim=True)
    return (scores - highest).clamp(max=MAX_EXPONENT).exp()


class _GatedAttention(torch.autograd.Function):
    """:func:`gated_attention_reference` with a fused kernel; scores are recomputed in backward.

    With weights w_ij per unit of gate, of which hidden keys have some too, outputs o_i and their
    gradients d_i, the gradient of gate_j is ``sum_i w_ij (d_i v_j - d_i o_i)``, and that of the
    score s_ij its summand times gate_j.
    """

    @staticmethod
    def forward(ctx, query, key, value, gate):
        bias = gate.log().to(query.dtype)[None, None, None]
        out = attention(query[None], key[None], value[None], bias)[0]
        ctx.save_for_backward(query, key, value, gate, out)
        return out

    @staticmethod
    def backward(ctx, grad):
        query, key, value, gate, out = ctx.saved_tensors
        scale = query.shape[-1] ** -0.5
        weights = _stable_exp((query * scale) @ key.transpose(-2, -1), gate)
        weights /= weights @ gate.to(weights.dtype)[:, None]
        change = (grad @ value.transpose(-2, -1)).to(weights.dtype)
        change -= (grad * out).sum(dim=-1, keepdim=True).to(weights.dtype)
        change *= weights
        grad_gate = change.sum(dim=(0, 1)).to(gate.dtype)
        grad_scores = (change * gate * scale).to(query.dtype)
        grad_value = (weights * gate).to(grad.dtype).transpose(-2, -1) @ grad
        return (
            grad_scores @ key, grad_scores.transpose(-2, -1) @ query, grad_value, grad_gate,
        )  # fmt: skip


def gated_attention_fused(
    query: Tensor, key: Tensor, value: Tensor, gate: Tensor, lengths: list[int]
) -> Tensor:
    """:func:`gated_attention` with fused kernels, for gates that are all greater than 0.

    A key that counts g times has a score that is log(g) higher. This is one more channel, 1 in the
    queries and log(g) in the keys, so that the kernel's own backward gives the gradient of the
    gate.
    """
    dims = query.shape[-1]
    wide = dims + CHANNEL_MULTIPLE
    # Kernels divide scores by the square root of the number of channels, which is now ``wide``.
    one = query.new_full((*query.shape[:2], 1), wide**0.5)
    log_gate = gate.log().to(key.dtype)[:, None, None].expand(-1, key.shape[1], 1)
    query = _widen(torch.cat([query * (wide / dims) ** 0.5, one], dim=-1), wide)
    key = _widen(torch.cat([key, log_gate], dim=-1), wide)
    return varlen_attention(query, key, _widen(value, wide), lengths)[..., :dims]


def _widen(x: Tensor, channels: int) -> Tensor:
    return F.pad(x, (0, channels - x.shape[-1]))


def _pad(x: Tensor, lengths: list[int]) -> Tensor:
    """``(M, heads, d) -> (B, heads, L, d)``, L being the greatest length. Inverse: _unpad."""
    return pad_sequence(x.split(lengths), batch_first=True).transpose(1, 2)


def _unpad(x: Tensor, lengths: list[int]) -> Tensor:
    x = x.transpose(1, 2)
    return torch.cat([sequence[:length] for sequence, length in zip(x, lengths, strict=True)])


def _has_varlen_kernel(x: Tensor) -> bool:
    return varlen_attn is not None and x.dtype in (torch.float16, torch.bfloat16)


def varlen_kernel(
    query: Tensor, key: Tensor, value: Tensor, lengths: list[int], key_lengths: list[int]
) -> Tensor:
    """Torch's kernel for packed sequences: half precision, CUDA, torch 2.10 or newer.

    Args:
        query: ``(M, heads, d)``.
        key, value: ``(N, heads, d)``.
        lengths: Queries of each sequence, adding up to M.
        key_lengths: Its keys, adding up to N.

    Returns:
        ``(M, heads, d)``.
    """
    cu_seqlens = [[0, *accumulate(n)] for n in (lengths, key_lengths)]
    cu_seqlens = torch.tensor(cu_seqlens, dtype=torch.int32).to(query.device, non_blocking=True)
    return varlen_attn(query, key, value, *cu_seqlens, max(lengths), max(key_lengths))
