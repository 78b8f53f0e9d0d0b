"""Choices of the network about its own tokens: how they are made, trained, and overridden."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import cycle, islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...runtime.tracing import untraced


def straight_through(scores: Tensor) -> Tensor:
    """One-hot choices of the highest score that have the gradient of a softmax.

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
) -> Tensor:
    """One-hot choices of all regions: sampled in training, the highest score otherwise.

    Args:
        scores: Of the choices of each region, finest first, ``(B, Hr, Wr, K)``.
        counts: Tokens that each region has under each choice, ``(Hr * Wr, K)``.
        kind: Of the ratio that :func:`routing_override` may set instead.
        training: Whether to sample, with the gradient of the Gumbel-softmax. An override has the
            gradient of the softmax.
        padding: Regions that are padding, ``(B, Hr, Wr)``, bool; they are as coarse as can be.
        temperature: Of the Gumbel-softmax, whose gradient alone depends on it.

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
    elif training:
        gates = straight_through((scores + gumbel_noise(scores)) / temperature)
    else:
        gates = one_hot(scores.argmax(dim=-1), scores)
    if padding is not None:
        coarsest = torch.zeros_like(gates)
        coarsest[..., -1] = 1
        gates = torch.where(padding[..., None], coarsest, gates)
    return gates


def explores(chooser: nn.Module, x: Tensor) -> bool:
    """Whether what chooses should sample, that is, whether anything can learn from it.

    The teacher of a semi-supervised detector is in training mode with its student, but fixed: its
    choices are those of inference.

    Args:
        chooser: A router or gate.
        x: What it looks at.
    """
    learns = x.requires_grad or any(p.requires_grad for p in chooser.parameters())
    return chooser.training and learns


def one_hot(choice: Tensor, like: Tensor) -> Tensor:
    """``(...)`` to ``(..., K)``, in shape, kind and place as ``like``."""
    return F.one_hot(choice, like.shape[-1]).to(like)


def gumbel_noise(scores: Tensor) -> Tensor:
    """Standard Gumbel noise in the shape of ``scores``."""
    return -torch.empty_like(scores).exponential_().log()


class RoutingOverride:
    """Random layouts with a given number of tokens; see :func:`routing_override`."""

    def __init__(self, kind: str, ratios: Sequence[float], seed: int) -> None:
        self.kind = kind
        self.ratios = tuple(ratios)
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self, counts: Tensor, batch: int) -> Tensor:
        """Draw one choice for each region of each image.

        Args:
            counts: Tokens that each region has under each choice, most first, ``(R, K)``.
            batch: Images, B. The i-th has the i-th ratio; ratios are repeated if there are fewer.

        Returns:
            Indices of choices, ``(B, R)``, on the CPU. The ratio of each image is as near as single
            changes of the layout bring it.
        """
        draw = self._draw_coarse if self.kind == 'coarse_ratio' else self._draw_queries
        ratios = islice(cycle(self.ratios), batch)
        with torch.device('cpu'):  # where the generator is
            return torch.stack([draw(counts.cpu(), ratio) for ratio in ratios])

    def _draw_coarse(self, counts: Tensor, ratio: float) -> Tensor:
        """Take the last choice in ``ratio`` of the regions, the first in all others."""
        num_regions, num_choices = counts.shape
        order = torch.randperm(num_regions, generator=self.generator)
        choice = torch.zeros(num_regions, dtype=torch.long)
        choice[order[: round(ratio * num_regions)]] = num_choices - 1
        return choice

    def _draw_queries(self, counts: Tensor, ratio: float) -> Tensor:
        """Have ``ratio`` of the most tokens that there can be."""
        num_regions = len(counts)
        target = ratio * counts[:, 0].sum().item()
        shares = _shares(tuple(counts.amax(dim=0).tolist()), ratio)
        order = torch.randperm(num_regions, generator=self.generator)
        choice = torch.empty(num_regions, dtype=torch.long)
        bounds = torch.tensor(shares).cumsum(0)[:-1]
        places = (torch.arange(num_regions) + 0.5) / num_regions
        choice[order] = torch.bucketize(places, bounds)
        counts, choice = counts[order], choice[order]
        while True:
            now = counts.gather(1, choice[:, None])
            missing = target - now.sum().item()
            errors = (counts - now - missing).abs().flatten()
            best = errors.argmin()
            if errors[best] >= abs(missing):
                break
            choice[best // counts.shape[1]] = best % counts.shape[1]
        return torch.empty_like(choice).scatter_(0, order, choice)


@lru_cache
def _shares(counts: tuple[int, ...], ratio: float) -> list[float]:
    """How often each choice is made so that counts have the given mean, otherwise most evenly."""
    sizes = [count / counts[0] for count in counts]

    def shares(tilt: float) -> list[float]:
        weights = [math.exp(tilt * size) for size in sizes]
        return [weight / sum(weights) for weight in weights]

    low, high = -500.0, 500.0
    for _ in range(60):
        tilt = (low + high) / 2
        mean = sum(s * size for s, size in zip(shares(tilt), sizes, strict=True))
        low, high = (tilt, high) if mean < ratio else (low, tilt)
    return shares((low + high) / 2)


_override: RoutingOverride | None = None


@contextmanager
def routing_override(
    *,
    query_ratio: float | Sequence[float] | None = None,
    coarse_ratio: float | Sequence[float] | None = None,
    seed: int = 0,
) -> Iterator[None]:
    """Inside this context regions do not choose for themselves: layouts are random.

    For benchmarks: an untrained network chooses nothing sensible, and the cost of a layout depends
    on how many tokens it has. All else runs as it would, in training too.

    Args:
        query_ratio: Queries over tokens, in (0, 1], for the grained backbones and neck (DGE); the
            nearest that changing single regions leads to in each image and block, which on a grid
            of a few regions may be some queries off.
        coarse_ratio: Coarse regions over regions, in [0, 1], for MSViT.
        seed: Of the random layouts.

    A sequence of ratios gives the images of a batch one each, in turn.

    Raises:
        ValueError: Not exactly one ratio, or one out of range; inside the context, a network that
            has the other kind of ratio.
    """
    given = {
        name: ratio
        for name, ratio in (('query_ratio', query_ratio), ('coarse_ratio', coarse_ratio))
        if ratio is not None
    }
    if len(given) != 1:
        raise ValueError(
            'give either query_ratio (DGE) or coarse_ratio (MSViT), '
            f'got {" and ".join(given) or "neither"}'
        )
    ((kind, ratio),) = given.items()
    ratios = tuple(ratio) if isinstance(ratio, Sequence) else (ratio,)
    too_low = kind == 'query_ratio' and 0 in ratios
    if not ratios or not all(0 <= r <= 1 for r in ratios) or too_low:
        raise ValueError(
            f'{kind} must be in {"(" if kind == "query_ratio" else "["}0, 1], got {ratio}'
        )
    global _override
    before, _override = _override, RoutingOverride(kind, ratios, seed)
    try:
        yield
    finally:
        _override = before


def current_override(kind: str) -> RoutingOverride | None:
    """The override in force, if any.

    Raises:
        ValueError: It is of another kind than ``'query_ratio'`` or ``'coarse_ratio'``, as asked.
    """
    if _override is not None and _override.kind != kind:
        raise ValueError(
            f'routing_override({_override.kind}=...) is in force, but this network has a {kind}'
        )
    return _override
