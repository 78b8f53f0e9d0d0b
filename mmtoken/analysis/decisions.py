"""Statistics of routing decisions: queries and tokens of regions, stages and networks.

For a network that chooses once, before its first block (MSViT), queries are the tokens that it
keeps, and tokens are all fine patches.
"""

from collections.abc import Iterable, Sequence
from itertools import groupby

import torch
from torch import Tensor

from ..layers.common.regions import make_region_layout
from ..runtime.decisions import RoutingDecision


def count_queries(decision: RoutingDecision) -> tuple[Tensor, Tensor]:
    """Queries and tokens of each region, padding included.

    Returns:
        Queries ``(B, Hr, Wr)`` and tokens ``(Hr, Wr)``. Regions that the bottom and right borders
        cut off have fewer of both.
    """
    regions = make_region_layout(decision.grid, tuple(decision.granularities), decision.region_size)
    counts = regions.num_cells.view(*regions.shape, -1)  # (Hr, Wr, K)
    choice = decision.choice.cpu().unsqueeze(-1)
    queries = counts.expand(len(choice), -1, -1, -1).gather(-1, choice).squeeze(-1)
    return queries, counts[..., decision.granularities.index(1)]


def token_owners(decision: RoutingDecision) -> Tensor:
    """The token, or query, of each place: the index of its first place, ``(B, H, W)``."""
    height, width = decision.grid
    rows, columns = torch.arange(height)[:, None], torch.arange(width)
    sides = torch.tensor(decision.granularities)[decision.choice.cpu()]  # (B, Hr, Wr)
    side = sides[:, rows // decision.region_size, columns // decision.region_size]
    return rows // side * side * width + columns // side * side


def real_regions(decision: RoutingDecision) -> Tensor:
    """Regions that are not padding, ``(B, Hr, Wr)``, bool."""
    if decision.padding is None:
        return torch.ones(decision.choice.shape, dtype=torch.bool)
    return ~decision.padding.cpu()


def image_ratios(decisions: Iterable[RoutingDecision]) -> Tensor:
    """Queries over tokens of each image, in all layers, without padding: ``(B,)``, float64."""
    queries, tokens = 0, 0
    for decision in decisions:
        real = real_regions(decision)
        in_regions, of_regions = count_queries(decision)
        queries = queries + (in_regions * real).sum(dim=(1, 2)).double()
        tokens = tokens + (of_regions * real).sum(dim=(1, 2)).double()
    return queries / tokens


def query_ratio(decisions: Iterable[RoutingDecision]) -> float:
    """Queries over tokens, the mean over images."""
    return image_ratios(decisions).mean().item()


def coarse_regions(decision: RoutingDecision) -> Tensor:
    """Regions of the coarsest granularity, without padding: ``(B, Hr, Wr)``, bool."""
    coarsest = decision.granularities.index(max(decision.granularities))
    return (decision.choice.cpu() == coarsest) & real_regions(decision)


def image_coarse_ratios(decisions: Iterable[RoutingDecision]) -> Tensor:
    """Coarsest regions over regions of each image, in all layers, without padding: ``(B,)``."""
    coarse, real = 0, 0
    for decision in decisions:
        coarse = coarse + coarse_regions(decision).sum(dim=(1, 2)).double()
        real = real + real_regions(decision).sum(dim=(1, 2)).double()
    return coarse / real


def coarse_ratio(decisions: Iterable[RoutingDecision]) -> float:
    """Coarsest regions over regions, the mean over images."""
    return image_coarse_ratios(decisions).mean().item()


def measured_ratios(decisions: Sequence[RoutingDecision]) -> dict[str, float]:
    """``query_ratio`` and ``coarse_ratio`` by name; empty without decisions."""
    if not decisions:
        return {}
    return dict(query_ratio=query_ratio(decisions), coarse_ratio=coarse_ratio(decisions))


def ratio_unit(decisions: Iterable[RoutingDecision]) -> str:
    """What the query ratio of a network counts, in words.

    Args:
        decisions: All decisions of the network.
    """
    return 'tokens per fine patch' if all(d.per_network for d in decisions) else 'queries per token'


def split_stages(decisions: Iterable[RoutingDecision]) -> list[list[RoutingDecision]]:
    """Group consecutive layers by grid."""
    return [list(layers) for _, layers in groupby(decisions, key=lambda d: d.grid)]


def stride_of(shape: tuple[int, int], grid: tuple[int, int]) -> int:
    """Side of a token in pixels, given the height and width of the image and of the grid.

    If several strides fit, a power of two is taken, otherwise the smallest.
    """
    largest = max(-(-side // tokens) for side, tokens in zip(shape, grid, strict=True))
    fitting = [
        stride
        for stride in range(largest, 2 * largest + 1)
        if all(-(-side // stride) == n for side, n in zip(shape, grid, strict=True))
    ]
    powers = [stride for stride in fitting if stride & (stride - 1) == 0]
    return (powers or fitting or [largest])[0]


def mean_density(decisions: list[RoutingDecision], image: int) -> Tensor:
    """Queries per token that regions chose, the mean over layers on one grid.

    The value is that of a whole region. Regions that a border cuts off have more queries per token
    for the same choice.

    Args:
        decisions: Of layers on one grid.
        image: Index in the batch.

    Returns:
        ``(Hr, Wr)``, in (0, 1].
    """
    chosen = [
        torch.tensor(d.granularities, dtype=torch.float64)[d.choice[image].cpu()] for d in decisions
    ]
    return torch.stack(chosen).pow(-2).mean(dim=0)
