"""Dynamic granularity: a router for each region, and a block with few queries.

Source: DGE, arXiv 2301.03831, section 3; released code, github.com/StevenGrove/vtpack (Apache-2.0),
for the initialization and the training modes.
Differences: stochastic depth drops whole images, not queries; the grid may have any size, not only
whole regions. Parameter names are the official ones, without the numbers of the stages.
"""

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn as nn
from timm.layers import DropPath, Mlp, trunc_normal_
from torch import Tensor

from ...runtime.decisions import RoutingDecision, record_decision
from ..common.plain import draws, weight_dtype
from ..common.precision import full_precision
from ..common.regions import (
    CellSet,
    RegionLayout,
    RegionPlan,
    all_cells,
    gate_per_cell,
    make_region_layout,
    plan_regions,
    pool_cells,
    pool_every_granularity,
    pool_regions,
    unpool_every_granularity,
    unpool_regions,
)
from ..common.routing import choose, explores, spend_queries

TrainMode = Literal['exact', 'dense', 'sparse']
FINEST_PROBABILITY = 0.95  # of a new router


class GranularityRouter(nn.Module):
    """Scores the granularities of each region, from the mean of its tokens.

    Args:
        embed_dims: Channels, C.
        num_granularities: K.
        region_size: Side of a region, in tokens.
    """

    def __init__(self, embed_dims: int, num_granularities: int, region_size: int) -> None:
        super().__init__()
        self.num_granularities = num_granularities
        self.region_size = region_size
        self.gate = nn.Linear(embed_dims, num_granularities)
        self.init_weights()

    def init_weights(self) -> None:
        """Nearly all regions start at the finest granularity, where the block is a plain one."""
        trunc_normal_(self.gate.weight, std=0.01)
        rest = self.num_granularities - 1
        odds = FINEST_PROBABILITY * rest / (1 - FINEST_PROBABILITY)
        with torch.no_grad():
            self.gate.bias.fill_(-math.log(odds) / 2)
            self.gate.bias[0] = math.log(odds) / 2

    def forward(self, x: Tensor) -> Tensor:
        """``(B, H, W, C) -> (B, Hr, Wr, K)``, float32 even in mixed precision."""
        with full_precision(x.device):
            means = pool_cells(x, self.region_size).to(weight_dtype(self.gate))
            return self.gate(means).float()


class Routing(NamedTuple):
    """What the regions of a batch chose for one block.

    Attributes:
        gates: One-hot choices, ``(B, Hr, Wr, K)``. They have a gradient if a router trains.
        plan: The queries that follow from them.
    """

    gates: Tensor
    plan: RegionPlan


class DynamicGranularityBlock(nn.Module):
    """Attention and MLP on pooled queries; keys and values are dense, and updates are un-pooled.

    Each region chooses a granularity, and the mean of each of its cells is a query. Queries pass
    through a pre-norm block, and every token receives the update of the query of its cell. With the
    finest granularity everywhere it is a plain block.

    Args:
        embed_dims: Channels, C.
        attn: Attention with the interface of
            :class:`~mmtoken.layers.dge.spatial_reduction.SpatialReductionAttention`.
        feedforward_channels: Hidden channels of the MLP.
        granularities: Sides of the cells, finest first, in tokens, starting with 1. ``(1,)`` makes
            a plain block without a router.
        region_size: Side of a region, in tokens; a multiple of each granularity.
        train_mode: How routers get their gradients. All modes have the same outputs and the same
            gradients of all other parameters. ``'dense'`` computes the queries of all
            granularities, as in the release. ``'exact'`` has the same gradients, but computes what
            was not chosen without autograd, with less memory and time. ``'sparse'`` computes only
            what was chosen, so that a router learns from its own choices alone.
        drop_path: Stochastic depth rate.
        norm_eps: Epsilon of the two LayerNorms.
        mlp: Makes the MLP, as ``Mlp(embed_dims, feedforward_channels)`` does.
        has_router: Whether it chooses itself; otherwise :meth:`forward` is told the choice.

    Raises:
        ValueError: Invalid granularities, region size or mode.
    """

    ratio_name: ClassVar[str] = 'query_ratio'

    def __init__(
        self,
        embed_dims: int,
        attn: nn.Module,
        feedforward_channels: int,
        granularities: tuple[int, ...] = (1, 2, 4),
        region_size: int = 4,
        train_mode: TrainMode = 'exact',
        drop_path: float = 0.0,
        norm_eps: float = 1e-6,
        mlp: Callable[..., nn.Module] = Mlp,
        has_router: bool = True,
    ) -> None:
        super().__init__()
        self.granularities = check_granularities(granularities, region_size)
        if train_mode not in TRAIN_MODES:
            raise ValueError(f"train_mode must be 'exact', 'dense' or 'sparse', got {train_mode!r}")
        self.embed_dims = embed_dims
        self.feedforward_channels = feedforward_channels
        self.region_size = region_size
        self.train_mode = train_mode
        self.norm1 = nn.LayerNorm(embed_dims, norm_eps)
        self.attn = attn
        self.norm2 = nn.LayerNorm(embed_dims, norm_eps)
        self.mlp = mlp(embed_dims, feedforward_channels)
        self.drop_path = DropPath(drop_path)
        self.budget: float | None = None  # of mmtoken.set_budget
        self.router = None
        if has_router and len(self.granularities) > 1:
            self.router = GranularityRouter(embed_dims, len(self.granularities), region_size)

    @property
    def least_budget(self) -> float | None:
        """Queries over tokens if all regions are as coarse as possible; None without a router."""
        return None if self.router is None else self.granularities[-1] ** -2

    def layout(
        self, grid: tuple[int, int], num_prefix_tokens: int, device: torch.device
    ) -> RegionLayout:
        """The regions of a grid, for this block and all with the same granularities."""
        return make_region_layout(
            grid, self.granularities, self.region_size, num_prefix_tokens, device
        )

    def route(
        self, x: Tensor, layout: RegionLayout, padding: Tensor | None = None
    ) -> Routing | None:
        """Choose the granularity of every region.

        Args:
            x: Tokens, ``(B, N, C)``.
            layout: From :meth:`layout`.
            padding: Regions that are padding, ``(B, Hr, Wr)``, from
                :func:`~mmtoken.layers.common.padding.padding_regions`; they take the coarsest
                granularity.

        Returns:
            The argument of :meth:`forward`; None without a router.
        """
        if self.router is None:
            return None
        scores = self.router(x[:, layout.num_prefix_tokens :].unflatten(1, layout.grid))
        sampled = explores(self.router, x)
        settled = None
        if self.budget is not None:
            settled = spend_queries(scores, layout.num_cells, self.budget, padding)
        gates = choose(scores, layout.num_cells, self.ratio_name, sampled, padding, settled=settled)
        choice = gates.argmax(dim=-1)
        record_decision(
            RoutingDecision(choice, self.granularities, self.region_size, layout.grid, padding)
        )
        return Routing(gates, plan_regions(choice, layout))

    def forward(self, x: Tensor, layout: RegionLayout, routing: Routing | None = None) -> Tensor:
        """Update all tokens.

        Args:
            x: Tokens, ``(B, N, C)``: prefix tokens, which are always queries, then those of the
                grid, row by row.
            layout: From :meth:`layout`.
            routing: From :meth:`route`; None makes every token a query.

        Returns:
            ``(B, N, C)``.
        """
        keys = self.attn.keys(self.norm1(x), layout)
        update = partial(self.block_update, keys=keys, keep=self.sample_drop_path(x))
        if routing is None:
            return x + update(x.flatten(0, 1), all_cells(layout, len(x))).view_as(x)
        gates, plan = routing
        if gates.requires_grad:
            pooled = pool_every_granularity(x, layout)  # B, L, C
            updates = TRAIN_MODES[self.train_mode](pooled.flatten(0, 1), plan.queries, update)
            updates = updates.view_as(pooled) * gate_per_cell(gates, layout).to(updates)
            return x + unpool_every_granularity(updates, layout)
        queries = pool_regions(x, plan)  # M, C
        return x + unpool_regions(update(queries, plan.queries), plan)

    def block_update(
        self,
        queries: Tensor,
        cells: CellSet,
        keys: Tensor,
        keep: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """What attention and MLP add to queries.

        Args:
            queries: ``(M, C)``.
            cells: The cells of the queries.
            keys: Of the attention.
            keep: From :meth:`sample_drop_path`.

        Returns:
            ``(M, C)``.
        """
        attended = self.attn(self.norm1(queries), keys, cells)
        if keep is None:
            return attended + self.mlp(self.norm2(queries + attended))
        lengths = torch.tensor(cells.lengths, device=queries.device)
        keep = [k.repeat_interleave(lengths, 0, output_size=len(queries)) for k in keep]  # M, 1
        attended = attended * keep[0]
        return attended + self.mlp(self.norm2(queries + attended)) * keep[1]

    def sample_drop_path(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """Stochastic depth: factors of attention and MLP for each image, ``(B, 1)``."""
        if not draws(self.drop_path):
            return None
        ones = x.new_ones(len(x), 1)
        return self.drop_path(ones), self.drop_path(ones)


Update = Callable[[Tensor, CellSet], Tensor]  # queries and their cells, (m, C) -> (m, C)


def update_dense(pooled: Tensor, chosen: CellSet, update: Update) -> Tensor:
    """Update the queries of all granularities.

    Args:
        pooled: The queries of all cells, ``(B * L, C)``.
        chosen: The cells that regions chose.
        update: :meth:`DynamicGranularityBlock.block_update`.

    Returns:
        ``(B * L, C)``.
    """
    return update(pooled, all_cells(chosen.layout, len(chosen.counts)))


def update_exact(pooled: Tensor, chosen: CellSet, update: Update) -> Tensor:
    """As :func:`update_dense`, but queries that were not chosen are updated without autograd.

    Their gates are 0, so that their updates only enter the gradients of the gates.
    """
    updates, rest = update(pooled.index_select(0, chosen.cells), chosen), chosen.complement
    with torch.no_grad():
        others = update(pooled.index_select(0, rest.cells), rest)
        out = torch.empty_like(pooled, dtype=updates.dtype).index_copy_(0, rest.cells, others)
    return out.index_copy_(0, chosen.cells, updates)


def update_sparse(pooled: Tensor, chosen: CellSet, update: Update) -> Tensor:
    """As :func:`update_dense`, with zeros for queries that were not chosen."""
    updates = update(pooled.index_select(0, chosen.cells), chosen)
    out = torch.zeros_like(pooled, dtype=updates.dtype)
    return out.index_copy_(0, chosen.cells, updates)


TRAIN_MODES = dict(exact=update_exact, dense=update_dense, sparse=update_sparse)


def check_granularities(granularities: Iterable[int], region_size: int) -> tuple[int, ...]:
    """Cell sides, rising from 1, that divide a region into whole cells.

    Raises:
        ValueError: They do not.
    """
    sides = tuple(granularities)
    rising = all(a < b for a, b in zip(sides, sides[1:], strict=False))
    if not sides or sides[0] != 1 or not rising or any(region_size % side for side in sides):
        raise ValueError(
            'granularities must rise from 1 and divide region_size='
            f'{region_size}, such as (1, 2, 4) divide 4; got {sides}'
        )
    return sides
