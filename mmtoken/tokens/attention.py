"""Scaled dot-product attention, through one door.

Every attention of the package is :func:`attention`, so that kernels are chosen, counted and
tested in one place. :func:`attention_reference` says the same in plain arithmetic.
"""

import torch.nn.functional as F
from torch import Tensor


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
