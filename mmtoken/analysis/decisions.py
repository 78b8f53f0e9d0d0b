"""What routing decisions amount to: queries and tokens of regions, of stages, of networks.

Of a network that chooses once, before its first block (MSViT), queries are the tokens it has, and
tokens the fine ones there could be.
"""

from collections.abc import Iterable
from itertools import groupby

import torch
from torch import Tensor

from ..layers.common.regions import make_region_layout
from ..runtime.decisions import RoutingDecision


def count_queries(decision: RoutingDecision) -> tuple[Tensor, Tensor]:
    """Queries and tokens of each region, padding included.

    Returns:
        Queries ``(B, Hr, Wr)`` and tokens ``(Hr, Wr)``. Regions at the bottom and right borders
        have only the tokens and cells that exist.
    """
    regions = make_region_layout(decision.grid, tuple(decision.granularities), decision.region_size)
    counts = regions.num_cells.view(*regions.shape, -1)  # (Hr, Wr, K)
    choice = decision.choice.cpu().unsqueeze(-1)
    queries = counts.expand(len(choice), -1, -1, -1).gather(-1, choice).squeeze(-1)
    return queries, counts[..., decision.granularities.index(1)]


def real_regions(decision: RoutingDecision) -> Tensor:
    """Regions that are not padding, ``(B, Hr, Wr)``, bool."""
    if decision.padding is None:
        return torch.ones(decision.choice.shape, dtype=torch.bool)
    return ~decision.padding.cpu()


def image_ratios(decisions: Iterable[RoutingDecision]) -> Tensor:
    """Queries over tokens of each image, of all layers, without padding: ``(B,)``, float64."""
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
    """Regions that are as coarse as can be, padding left out, ``(B, Hr, Wr)``, bool."""
    coarsest = decision.granularities.index(max(decision.granularities))
    return (decision.choice.cpu() == coarsest) & real_regions(decision)


def image_coarse_ratios(decisions: Iterable[RoutingDecision]) -> Tensor:
    """Coarsest regions over regions of each image, of all layers, without padding: ``(B,)``."""
    coarse, real = 0, 0
    for decision in decisions:
        coarse = coarse + coarse_regions(decision).sum(dim=(1, 2)).double()
        real = real + real_regions(decision).sum(dim=(1, 2)).double()
    return coarse / real


def coarse_ratio(decisions: Iterable[RoutingDecision]) -> float:
    """Coarsest regions over regions, the mean over images."""
    return image_coarse_ratios(decisions).mean().item()


def ratio_unit(decisions: Iterable[RoutingDecision]) -> str:
    """What a query ratio counts, in words: a network that chooses once chooses its tokens.

    Args:
        decisions: Of the whole network.
    """
    return 'tokens per fine patch' if all(d.per_network for d in decisions) else 'queries per token'


def split_stages(decisions: Iterable[RoutingDecision]) -> list[list[RoutingDecision]]:
    """Layers that follow each other on one grid."""
    return [list(layers) for _, layers in groupby(decisions, key=lambda d: d.grid)]


def mean_density(decisions: list[RoutingDecision], image: int) -> Tensor:
    """Queries per token that regions chose, the mean over layers on one grid.

    Of a whole region: at the borders, where cells are cut off, this is still what was chosen,
    though there are more queries for the tokens that are left.

    Args:
        decisions: Of layers on one grid.
        image: Which of the batch.

    Returns:
        ``(Hr, Wr)``, in (0, 1].
    """
    chosen = [
        torch.tensor(d.granularities, dtype=torch.float64)[d.choice[image].cpu()] for d in decisions
    ]
    return torch.stack(chosen).pow(-2).mean(dim=0)
