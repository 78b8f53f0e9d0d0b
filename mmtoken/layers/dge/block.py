"""A transformer block of dynamic granularity: few queries, dense keys, un-pooled updates.

Source: DGE, arXiv 2301.03831, section 3; released code github.com/StevenGrove/vtpack (Apache-2.0),
for the initialisation, the training paths and the count of complexity. Differences: stochastic
depth drops whole images, not queries; any grid is taken, not whole regions only.
"""

import math
from collections.abc import Iterable
from typing import Literal

import torch
import torch.nn as nn
from timm.layers import DropPath, Mlp, trunc_normal_
from torch import Tensor

from ...losses.usage import Usage
from ...runtime.decisions import RoutingDecision, record_decision
from ..common.old_tiles import tokens_per_tile, use_tiling
from ..common.plain import draws, weight_dtype
from ..common.precision import full_precision
from ..common.regions import (
    CellSet,
    RegionLayout,
    RegionPlan,
    add_unpooled,
    all_cells,
    gate_per_cell,
    make_region_layout,
    plan_regions,
    pool_cells,
    pool_every_granularity,
    pool_regions,
    unpool_every_granularity,
)
from ..common.routing import choose, explores
from ..common.utils import run_block

TrainMode = Literal['exact', 'dense', 'sparse']
FINEST_PROBABILITY = 0.95  # of a router before it has learned anything


class GranularityRouter(nn.Module):
    """Scores for the granularities of each region, from the mean of its tokens.

    Args:
        embed_dims: Channels.
        num_granularities: K.
        region_size: Side of a region, in tokens.
    """

    def __init__(self, embed_dims: int, num_granularities: int, region_size: int) -> None:
        super().__init__()
        self.embed_dims = embed_dims
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

    def complexity(self, tokens: Tensor) -> Tensor:
        """Operations of a number of tokens, as the budget counts them."""
        dims, choices = self.embed_dims, self.num_granularities
        return tokens / self.region_size**2 * dims * (1 + choices)


class DynamicGranularityBlock(nn.Module):
    """Attention and MLP on pooled queries, against the whole map; the change is un-pooled.

    Each region chooses its granularity; the mean of each cell is a query. Queries go through a
    pre-norm block whose keys and values are dense, and every token receives the change of the
    query of its cell. With the finest granularity everywhere it is a plain block.

    Args:
        embed_dims: Channels.
        attn: Attention with the interface of
            :class:`~mmtoken.layers.dge.spatial_reduction.SpatialReductionAttention`.
        feedforward_channels: Hidden channels of the MLP.
        granularities: Sides of a cell, finest first, in tokens, beginning with 1. ``(1,)`` makes a
            plain block, without a router.
        region_size: Side of a region, in tokens; a multiple of each granularity.
        train_mode: How routers get their gradients; all modes have the same forward values and the
            same gradients of all other parameters. ``'dense'`` computes the queries of all
            granularities, as in the release. ``'exact'`` has the same gradients but computes what
            was not chosen without autograd: less memory and time. ``'sparse'`` computes only what
            was chosen, and a router learns from its own choices alone.
        drop_path: Stochastic depth rate.
        norm_eps: Of the two LayerNorms.
        with_cp: Recompute the activations in backward; choices are kept.

    Raises:
        ValueError: Bad granularities, region size or mode.
    """

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
        with_cp: bool = False,
    ) -> None:
        super().__init__()
        self.granularities = check_granularities(granularities, region_size)
        if train_mode not in ('exact', 'dense', 'sparse'):
            raise ValueError(f"train_mode must be 'exact', 'dense' or 'sparse', got {train_mode!r}")
        self.embed_dims = embed_dims
        self.feedforward_channels = feedforward_channels
        self.region_size = region_size
        self.train_mode = train_mode
        self.with_cp = with_cp
        self.norm1 = nn.LayerNorm(embed_dims, norm_eps)
        self.attn = attn
        self.norm2 = nn.LayerNorm(embed_dims, norm_eps)
        self.mlp = Mlp(embed_dims, feedforward_channels)
        self.drop_path = DropPath(drop_path)
        self.router = None
        if len(self.granularities) > 1:
            self.router = GranularityRouter(embed_dims, len(self.granularities), region_size)

    def forward(
        self,
        x: Tensor,
        grid: tuple[int, int],
        padding: Tensor | None = None,
        measured: bool = True,
    ) -> tuple[Tensor, Usage | None]:
        """Update all tokens.

        Args:
            x: Tokens, ``(B, N, C)``: extra ones first, which are always queries, then those of the
                grid, row by row.
            grid: ``(H, W)``.
            padding: Regions that are padding, ``(B, Hr, Wr)``, from
                :func:`~mmtoken.layers.common.padding.padding_regions`: they take the coarsest granularity
                and do not count.
            measured: Whether to measure what is used.

        Returns:
            Tokens ``(B, N, C)``, and what was used; None without a router, or if not measured.
        """
        num_prefix_tokens = x.shape[1] - grid[0] * grid[1]
        regions = make_region_layout(
            grid, self.granularities, self.region_size, num_prefix_tokens, x.device
        )
        if self.router is None:
            return run_block(self.mix_all, x, regions, recompute=self.with_cp), None
        scores = self.router(x[:, num_prefix_tokens:].unflatten(1, grid))
        sampled = explores(self.router, x)
        gates = choose(scores, regions.num_cells, 'query_ratio', sampled, padding)
        choice = gates.argmax(dim=-1)
        record_decision(
            RoutingDecision(choice, self.granularities, self.region_size, grid, padding)
        )
        plan = plan_regions(choice, regions)
        mixed = run_block(self.mix, x, gates, plan, recompute=self.with_cp)
        return mixed, self.measure(gates, regions, padding) if measured else None

    def mix(self, x: Tensor, gates: Tensor, plan: RegionPlan) -> Tensor:
        """The block itself, when choices have been made: ``(B, N, C) -> (B, N, C)``."""
        regions, chosen = plan.queries.regions, plan.queries
        keys = self.attn.keys(x, self.norm1, regions.grid)
        kept = self.sample_drop_path(x)
        if not (self.training and torch.is_grad_enabled()):
            return add_unpooled(x, self.encode(pool_regions(x, plan), keys, chosen, kept), plan)

        pooled = pool_every_granularity(x, regions).flatten(0, 1)
        if self.train_mode == 'dense':
            updates = self.encode(pooled, keys, all_cells(regions, len(x)), kept)
        else:
            updates = self.encode(pooled.index_select(0, chosen.cells), keys, chosen, kept)
            rest = torch.zeros_like(pooled, dtype=updates.dtype)
            if self.train_mode == 'exact':
                with torch.no_grad():
                    others = chosen.others
                    unchosen = pooled.index_select(0, others.cells)
                    rest[others.cells] = self.encode(unchosen, keys, others, kept).to(rest)
            updates = rest.index_copy_(0, chosen.cells, updates)
        updates = updates.unflatten(0, (len(x), -1)) * gate_per_cell(gates, regions).to(updates)
        return x + unpool_every_granularity(updates, regions)

    def mix_all(self, x: Tensor, regions: RegionLayout) -> Tensor:
        """The block with every token a query: ``(B, N, C) -> (B, N, C)``."""
        keys, kept = self.attn.keys(x, self.norm1, regions.grid), self.sample_drop_path(x)
        cells = all_cells(regions, len(x))
        return self.encode(x.flatten(0, 1), keys, cells, kept, residual=True).view_as(x)

    def sample_drop_path(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """Stochastic depth: what attention and MLP of each image are multiplied by, ``(B, 1)``."""
        if not draws(self.drop_path):
            return None
        ones = x.new_ones(len(x), 1)
        return self.drop_path(ones), self.drop_path(ones)

    def encode(
        self,
        queries: Tensor,
        keys: Tensor,
        cells: CellSet,
        kept: tuple[Tensor, Tensor] | None,
        residual: bool = False,
    ) -> Tensor:
        """What becomes of queries.

        Args:
            queries: ``(M, C)``.
            keys: Of the attention.
            cells: The queries' own.
            kept: From :meth:`sample_drop_path`.
            residual: Return the new queries instead of their change.

        Returns:
            ``(M, C)``.
        """
        if not use_tiling(queries, False, self.attn, self.norm1, self.norm2, self.mlp):
            change = self.change(queries, keys, cells, kept)
            return queries + change if residual else change
        out = torch.empty_like(queries)
        for image, part, tile in cells.tiles(tokens_per_tile(self.feedforward_channels // 4)):
            of_image = None if kept is None else tuple(k[image : image + 1] for k in kept)
            change = self.change(queries[part], keys[image : image + 1], tile, of_image)
            out[part] = queries[part] + change if residual else change
        return out

    def change(
        self,
        queries: Tensor,
        keys: Tensor,
        cells: CellSet,
        kept: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """What attention and MLP add to queries: ``(M, C) -> (M, C)``."""
        attended = self.attn(self.norm1(queries), keys, cells)
        if kept is not None:
            lengths = torch.tensor(cells.lengths, device=queries.device)
            kept = [k.repeat_interleave(lengths, 0, output_size=len(queries)) for k in kept]
            attended = attended * kept[0]
        hidden = self.mlp(self.norm2(queries + attended))
        return attended + (hidden if kept is None else hidden * kept[1])

    def measure(self, gates: Tensor, regions: RegionLayout, padding: Tensor | None) -> Usage:
        """Count tokens and queries, without padding.

        Args:
            gates: From :func:`~mmtoken.layers.common.routing.choose`. Counts are of their type; of
                integers, which have no gradient, float64.
            regions: Of the grid.
            padding: As for :meth:`forward`.
        """
        gates = gates if gates.is_floating_point() else gates.double()
        counts = regions.num_cells.to(gates.dtype)
        real = gates.new_ones(len(gates), len(counts))
        if padding is not None:
            real = (~padding).flatten(1).to(gates.dtype)
        tokens = regions.num_prefix_tokens + (real * counts[:, 0]).sum(dim=1)
        cells = (gates.flatten(1, 2) * counts).sum(dim=-1)
        queries = regions.num_prefix_tokens + (real * cells).sum(dim=1)
        static, dynamic = self.complexity(tokens, tokens), self.complexity(tokens, queries)
        return Usage(static, dynamic, tokens, queries)

    def complexity(self, tokens: Tensor, queries: Tensor) -> Tensor:
        """Operations of a number of tokens and queries, as the released code counts them.

        These are no multiply-accumulates, but what the budget's target is a fraction of.
        """
        dims, hidden = self.embed_dims, self.feedforward_channels
        total = 2 * tokens * dims + 2 * queries * dims * hidden + queries * hidden
        return total + self.attn.complexity(tokens, queries) + self.router.complexity(tokens)


def check_granularities(granularities: Iterable[int], region_size: int) -> tuple[int, ...]:
    """Cell sides, rising from 1, that cut a region into whole cells.

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
