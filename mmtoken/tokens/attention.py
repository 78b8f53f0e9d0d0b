"""Scaled dot-product attention, through one door.

Every attention of the package is :func:`attention`, so that kernels are chosen, counted and
tested in one place. :func:`attention_reference` says the same in plain arithmetic.
"""

from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .reference import on_reference_path

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
    # For a bias that is learned torch has no fused kernel on a CPU, and its substitute is slower
    # than plain products.
    if bias is not None and bias.requires_grad and query.device.type == 'cpu':
        return attention_reference(query, key, value, bias)
    if bias is not None:
        bias = bias.to(query.dtype)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias)


def attention_reference(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None
) -> Tensor:
    """What :func:`attention` computes, written out."""
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    if bias is not None:
        scores = scores + bias.to(query.dtype)
    return scores.softmax(dim=-1) @ value


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """``(B, L, heads * d) -> (B, heads, L, d)``. Inverse: :func:`join_heads`."""
    batch, length, channels = x.shape
    return x.view(batch, length, num_heads, channels // num_heads).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """``(B, heads, L, d) -> (B, L, heads * d)``. Inverse: :func:`split_heads`."""
    return x.transpose(1, 2).flatten(2)


def ragged_attention(query: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> Tensor:
    """Attention of packed queries, each to the keys of its own image.

    Keys are as many in every image, so that no mask is needed however images are put together.
    :func:`ragged_attention_reference` does the same image by image.

    Args:
        query: ``(M, heads, d)``, image after image.
        key, value: ``(B, heads, K, d)``.
        lengths: Queries of each image, adding up to M.

    Returns:
        ``(M, heads, d)``.
    """
    if len(set(lengths)) == 1:
        query = query.unflatten(0, (len(lengths), -1)).transpose(1, 2)
        return attention(query, key, value).transpose(1, 2).flatten(0, 1)
    if query.device.type == 'cpu' or on_reference_path():
        return ragged_attention_reference(query, key, value, lengths)
    if varlen_attn is not None and query.dtype in (torch.float16, torch.bfloat16):
        return _varlen_attention(query, key, value, lengths)
    padded = pad_sequence(query.split(lengths), batch_first=True).transpose(1, 2)
    out = attention(padded, key, value).transpose(1, 2)
    return torch.cat([image[:length] for image, length in zip(out, lengths, strict=True)])


def ragged_attention_reference(
    query: Tensor, key: Tensor, value: Tensor, lengths: list[int]
) -> Tensor:
    """What :func:`ragged_attention` computes, one image at a time; on a CPU also the fastest."""
    out = []
    for image, q in enumerate(query.split(lengths)):
        k, v = key[image : image + 1], value[image : image + 1]
        out.append(attention(q.transpose(0, 1)[None], k, v)[0].transpose(0, 1))
    return torch.cat(out)


def _varlen_attention(query: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> Tensor:
    batch, _, num_keys, _ = key.shape
    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    key_ends = torch.arange(batch + 1, dtype=torch.int32, device=query.device) * num_keys
    key, value = (t.transpose(1, 2).flatten(0, 1) for t in (key, value))
    ends = ends.to(query.device, non_blocking=True)
    return varlen_attn(query, key, value, ends, key_ends, max(lengths), num_keys)
