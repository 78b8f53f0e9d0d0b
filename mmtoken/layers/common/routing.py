"""Routing decisions of dynamic networks: how they are made and trained."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...runtime.routing_override import current_override
from ...runtime.tracing import untraced

BISECTIONS = 40


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
    of the probabilities of all choices that are as coarse or coarser. A price of a query, one for
    each image, decides where finer choices pay; it is found by bisection.

    Args:
        scores: Of the choices of each region, finest first, ``(B, Hr, Wr, K)``.
        counts: Queries that each region has under each choice, ``(Hr * Wr, K)``.
        query_ratio: Queries of an image over those of the finest choice everywhere, without
            padding. It is not exceeded, unless even the coarsest choice everywhere does.
        padding: Regions that are padding, ``(B, Hr, Wr)``, bool; None for none.

    Returns:
        Indices of choices, ``(B, Hr, Wr)``.
    """
    serves = scores.detach().float().softmax(dim=-1).flatten(1, 2)  # (B, R, K)
    serves = serves.flip(-1).cumsum(dim=-1).flip(-1)
    counts = counts.to(serves)
    costs = counts / counts[:, :1]
    real = torch.ones_like(serves[..., 0]) if padding is None else (~padding).flatten(1).to(serves)
    allowed = query_ratio * (real * counts[:, 0]).sum(dim=1)

    def choice(price: Tensor) -> Tensor:
        return (serves - price[:, None, None] * costs).argmax(dim=-1)

    # Between prices at which all regions are finest and coarsest
    least = (costs[:, :-1] - costs[:, 1:]).clamp(min=1e-6).min() if costs.shape[1] > 1 else 1
    high = torch.ones_like(allowed) * 2 / least
    low = -high
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        spent = counts.expand(len(serves), -1, -1).gather(-1, choice(middle)[..., None])
        affordable = (spent[..., 0] * real).sum(dim=1) <= allowed
        low, high = torch.where(affordable, low, middle), torch.where(affordable, middle, high)
    return choice(high).view(scores.shape[:-1])


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
    return F.one_hot(choice, like.shape[-1]).to(like)


def gumbel_noise(scores: Tensor) -> Tensor:
    """Standard Gumbel noise in the shape of ``scores``."""
    return -torch.empty_like(scores).exponential_().log()
