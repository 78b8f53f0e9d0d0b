"""Routing decisions of dynamic networks: how they are made and trained."""

import torch
from torch import Tensor, nn

from ...runtime.routing_override import current_override
from ...runtime.torch_private import untraced


def straight_through(scores: Tensor) -> Tensor:
    """One-hot choices of the highest score, with the gradient of a softmax.

    Args:
        scores: ``(..., K)``; to sample, add :func:`gumbel_noise`.

    Returns:
        ``(..., K)``, exactly 0 and 1.
    """
    soft = scores.softmax(dim=-1)
    return with_gradient_of(one_hot(scores.argmax(dim=-1), scores), soft)


def with_gradient_of(value: Tensor, other: Tensor) -> Tensor:
    """``value``, with the gradient of ``other``."""
    # In this order the result is exactly ``value``.
    return value + (other - other.detach())


def choose(
    scores: Tensor,
    counts: Tensor,
    kind: str,
    training: bool,
    padding: Tensor | None = None,
    temperature: float = 1.0,
    settled: Tensor | None = None,
) -> Tensor:
    """One-hot choices of all regions: sampled in training, the highest score otherwise.

    Args:
        scores: Of the choices of each region, finest first, ``(B, Hr, Wr, K)``.
        counts: Tokens that each region has under each choice, ``(Hr * Wr, K)``.
        kind: Of the ratio that :func:`routing_override` may set instead.
        training: Whether to sample, with the gradient of the Gumbel-softmax. An override has the
            gradient of the softmax.
        padding: Regions that are padding, ``(B, Hr, Wr)``, bool; they take the coarsest choice.
        temperature: Of the Gumbel-softmax; it changes the gradient only.
        settled: Choices that meet a budget, ``(B, Hr, Wr)``, which are taken instead; nothing is
            sampled then.

    Returns:
        ``(B, Hr, Wr, K)``, exactly 0 and 1.

    Raises:
        RuntimeError: ``torch.jit.trace`` is recording, and no override is in force.
    """
    override = current_override(kind)
    if override is None and torch.jit.is_tracing():
        option = f'--{kind.replace("_", "-")}'
        raise RuntimeError(
            'this network chooses its tokens image by image, and torch.jit.trace would keep the '
            'choices that it makes for one. To count operations: python tools/analysis/flops.py '
            f'CONFIG {option} R, or count inside of `with mmtoken.routing_override({kind}=R):`. '
            'To export: mmtoken.dense_twin(cfg) does not choose'
        )
    if override is not None:
        with untraced():
            drawn = override.draw(counts, len(scores))
        drawn = drawn.view(scores.shape[:-1]).to(scores.device)
        gates = one_hot(drawn, scores)
        if training:
            gates = with_gradient_of(gates, scores.softmax(dim=-1))
    elif settled is not None:
        gates = one_hot(settled, scores)
        if training:
            gates = with_gradient_of(gates, (scores / temperature).softmax(dim=-1))
    elif training:
        gates = straight_through((scores + gumbel_noise(scores)) / temperature)
    else:
        gates = one_hot(scores.argmax(dim=-1), scores)
    if padding is not None:
        coarsest = torch.zeros_like(gates)
        coarsest[..., -1] = 1
        gates = torch.where(padding[..., None], coarsest, gates)
    return gates


def rank_regions(scores: Tensor, fine_ratio: float, padding: Tensor | None = None) -> Tensor:
    """The choice of each region, if so many regions of an image are fine.

    Args:
        scores: Fine and coarse, ``(B, Hr, Wr, 2)``.
        fine_ratio: Share of the regions without padding that are fine, rounded to whole regions.
        padding: Regions that are padding, ``(B, Hr, Wr)``, bool; None for none.

    Returns:
        0 for fine and 1 for coarse, ``(B, Hr, Wr)``.
    """
    needs = (scores[..., 0] - scores[..., 1]).detach()
    regions = torch.ones_like(needs, dtype=torch.bool) if padding is None else ~padding
    needs = needs.masked_fill(~regions, -torch.inf).flatten(1)
    order = needs.argsort(dim=1, descending=True, stable=True)
    rank = order.argsort(dim=1)
    number = (regions.flatten(1).sum(dim=1, keepdim=True) * fine_ratio).round()
    return (rank >= number).long().view(scores.shape[:-1])


def spend_queries(
    scores: Tensor, counts: Tensor, query_ratio: float, padding: Tensor | None = None
) -> Tensor:
    """The choices that keep the labels of most regions with a given number of queries.

    A choice serves a region if it is no coarser than the one that the region needs, so with the sum
    of the probabilities of all choices that are as coarse or coarser. Regions become finer in the
    order of what a query more gains, as long as queries are left.

    Args:
        scores: Of the choices of each region, finest first, ``(B, Hr, Wr, K)``.
        counts: Queries that each region has under each choice, ``(Hr * Wr, K)``.
        query_ratio: Queries of an image over those of the finest choice everywhere, without
            padding. It is not exceeded, unless even the coarsest choice everywhere does.
        padding: Regions that are padding, ``(B, Hr, Wr)``, bool; None for none.

    Returns:
        Indices of choices, ``(B, Hr, Wr)``.
    """
    shape, steps = scores.shape[:-1], scores.shape[-1] - 1
    serves = scores.detach().float().softmax(dim=-1).flatten(1, 2)
    serves, counts = serves.flip(-1).cumsum(dim=-1), counts.flip(-1)  # from coarse to fine
    real = torch.ones_like(serves[..., :1]) if padding is None else ~padding.flatten(1)[..., None]
    counts = counts * real.to(counts)  # (B, R, K)
    least, most = counts[..., 0].sum(dim=1), counts[..., -1].sum(dim=1)
    # A hundredth of a query more, so that float32 loses none of a whole number
    left = query_ratio * most + 0.01 - least
    gain = gain_per_query(serves, counts)  # (B, R, K - 1)
    order = gain.flatten(1).argsort(dim=1, descending=True, stable=True)
    spent = counts.diff(dim=-1).flatten(1).gather(1, order).cumsum(dim=1)
    taken = torch.zeros_like(order, dtype=torch.bool).scatter(1, order, spent <= left[:, None])
    taken = taken.view_as(gain)
    for i in reversed(range(steps - 1)):  # steps of equal gain are one: both or none
        taken[..., i] &= taken[..., i + 1] | (gain[..., i] > gain[..., i + 1])
    return (steps - taken.sum(dim=-1)).view(shape)


def gain_per_query(values: Tensor, counts: Tensor) -> Tensor:
    """What a query more is worth in each step from a choice to the next finer one.

    A step that gains less than the one behind it has the mean gain of both: these are the slopes of
    the least concave function above the values.

    Args:
        values: Of the choices, from coarse to fine, ``(..., K)``.
        counts: Their queries, rising or equal, ``(..., K)``.

    Returns:
        ``(..., K - 1)``, falling.
    """
    rise = values[..., None, :] - values[..., :, None]
    rise = rise / (counts[..., None, :] - counts[..., :, None]).clamp(min=1e-6)  # (..., from, to)
    steps = range(1, values.shape[-1])
    return torch.stack([rise[..., :i, i:].amax(dim=-1).amin(dim=-1) for i in steps], dim=-1)


def explores(chooser: nn.Module, x: Tensor) -> bool:
    """Whether a router should sample, that is, whether anything can learn from its choices.

    The teacher of a semi-supervised detector is in training mode, but frozen: its choices are those
    of inference.

    Args:
        chooser: A router or gate.
        x: Its input.
    """
    learns = x.requires_grad or any(p.requires_grad for p in chooser.parameters())
    return chooser.training and learns


def one_hot(choice: Tensor, like: Tensor) -> Tensor:
    """``(...)`` to ``(..., K)``, with the shape, dtype and device of ``like``."""
    # F.one_hot looks at the values in torch 2.1, where fake tensors have none.
    return (choice[..., None] == torch.arange(like.shape[-1], device=choice.device)).to(like)


def gumbel_noise(scores: Tensor) -> Tensor:
    """Standard Gumbel noise in the shape of ``scores``."""
    return -torch.empty_like(scores).exponential_().log()
