"""Which semantic token each image token belongs to, for pictures."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ...runtime.decisions import TokenGroups, record_groups
from ..common.attention import cross_attention


def record_attended(
    block: nn.Module,
    image: Tensor,
    semantic: Tensor,
    grid: tuple[int, int],
    attend: Callable[[Tensor, Tensor, int], Tensor] = cross_attention,
) -> None:
    """Record the semantic token that each image token attends to most.

    Args:
        block: A block with ``norm1`` and ``attn`` in which image tokens are the queries.
        image: Image tokens, ``(B, ..., C)``, not normalized.
        semantic: What they attend to, ``(B, ..., C)``, not normalized.
        grid: ``(H, W)`` of the image tokens.
        attend: Attention of projected tokens.
    """

    def make() -> TokenGroups:
        query, key = (block.norm1(tokens) for tokens in (image, semantic))
        attn = block.attn
        owner = most_attended(attn.q(query), attn.kv(key), attn.num_heads, attend)
        return TokenGroups('semantic tokens attended most', owner.view(-1, *grid), complete=False)

    record_groups(make)


def most_attended(
    query: Tensor,
    key_value: Tensor,
    num_heads: int,
    attend: Callable[[Tensor, Tensor, int], Tensor] = cross_attention,
) -> Tensor:
    """Index of the key that gets most attention from each query, the mean over heads.

    Whatever ``attend`` does, attention to one-hot values is the weights: C / heads keys at a time.

    Args:
        query: Projected, ``(B, ..., C)``.
        key_value: Projected, ``(B, ..., 2 * C)``.
        num_heads: Attention heads.
        attend: Attention of queries to keys and values.

    Returns:
        ``(B, ...)``.
    """
    key = key_value.chunk(2, dim=-1)[0]
    width, number = key.shape[-1] // num_heads, key[0, ..., 0].numel()
    highest, owner = query.new_full(query.shape[:-1], -1.0), 0
    for start in range(0, number, width):
        one_hot = torch.eye(width, device=key.device, dtype=key.dtype)[: number - start]
        value = key.new_zeros(number, width)
        value[start : start + width] = one_hot
        value = value.repeat(1, num_heads).view(key.shape[1:]).expand_as(key)
        weights = attend(query, torch.cat([key, value], dim=-1), num_heads)
        weight, index = weights.unflatten(-1, (num_heads, width)).mean(dim=-2).max(dim=-1)
        owner = torch.where(weight > highest, index + start, owner)
        highest = torch.maximum(highest, weight)
    return owner
