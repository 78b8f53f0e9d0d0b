"""Random layouts with a given number of tokens, instead of learned routing decisions."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from functools import lru_cache
from itertools import cycle, islice

import torch
from torch import Tensor


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
            Indices of choices, ``(B, R)``, on the CPU. No change of a single region would bring the
            ratio of an image closer.
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
        """Choose so that ``ratio`` of the largest possible number of tokens remain."""
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


class ReplayedOverride(RoutingOverride):
    """Draws each layout once; see :func:`replayed_routing`."""

    def __init__(self, kind: str, ratios: Sequence[float], seed: int) -> None:
        super().__init__(kind, ratios, seed)
        self.layouts: list[Tensor] = []
        self.place = 0  # of the layout that is given out next

    @torch.compiler.disable  # which would compile a network anew for each place
    def draw(self, counts: Tensor, batch: int) -> Tensor:
        """As in the base class, but on the device of ``counts``."""
        if self.place == len(self.layouts):
            self.layouts.append(super().draw(counts, batch).to(counts.device))
        self.place += 1
        return self.layouts[self.place - 1]


@lru_cache
def _shares(counts: tuple[int, ...], ratio: float) -> list[float]:
    """The most even distribution of choices whose counts have the given mean."""
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


_override: ContextVar[RoutingOverride | None] = ContextVar('mmtoken_override', default=None)


@contextmanager
def routing_override(
    *,
    query_ratio: float | Sequence[float] | None = None,
    coarse_ratio: float | Sequence[float] | None = None,
    seed: int = 0,
) -> Iterator[None]:
    """Inside this context layouts are random instead of chosen by the network.

    For benchmarks: an untrained network chooses nothing sensible, and the cost of a layout depends
    on the number of its tokens. Everything else runs as usual, in training too. Other threads are
    not affected.

    Args:
        query_ratio: Queries over tokens, in (0, 1], for the backbones and the neck of DGE; the
            nearest ratio that random layouts reach in each image and block, which on a grid of a
            few regions may be some queries off.
        coarse_ratio: Coarse regions over regions, in [0, 1], for MSViT.
        seed: Of the random layouts.

    With a sequence of ratios, the images of a batch take one each, in turn.

    Raises:
        ValueError: Not exactly one ratio, or one out of range; inside the context, a network that
            has the other kind of ratio.
    """
    with _in_force(RoutingOverride(*_check(query_ratio, coarse_ratio), seed)):
        yield


def replayed_routing(
    *,
    query_ratio: float | Sequence[float] | None = None,
    coarse_ratio: float | Sequence[float] | None = None,
    seed: int = 0,
) -> Callable[[], AbstractContextManager[None]]:
    """Many contexts of :func:`routing_override` whose layouts are drawn once, in the first one.

    For timing: drawing layouts on the CPU takes longer than a GPU needs for the network.

    Args:
        query_ratio, coarse_ratio, seed: See :func:`routing_override`.

    Returns:
        Makes a context. All are for one network and images of one size; layouts stay on its device.

    Raises:
        ValueError: See :func:`routing_override`.
    """
    override = ReplayedOverride(*_check(query_ratio, coarse_ratio), seed)

    def replay() -> AbstractContextManager[None]:
        override.place = 0
        return _in_force(override)

    return replay


def _check(
    query_ratio: float | Sequence[float] | None, coarse_ratio: float | Sequence[float] | None
) -> tuple[str, tuple[float, ...]]:
    """The kind of the ratio that is given, and the ratios."""
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
    return kind, ratios


@contextmanager
def _in_force(override: RoutingOverride) -> Iterator[None]:
    token = _override.set(override)
    try:
        yield
    finally:
        _override.reset(token)


@torch.compiler.disable  # which cannot trace a ContextVar
def current_override(kind: str) -> RoutingOverride | None:
    """The override in force, if any.

    Raises:
        ValueError: It is of another kind than ``'query_ratio'`` or ``'coarse_ratio'``, as asked.
    """
    override = _override.get()
    if override is not None and override.kind != kind:
        raise ValueError(
            f'routing_override({override.kind}=...) is in force, but this network has a {kind}'
        )
    return override
