"""Blocks of dynamic granularity, tile by tile: queries do not depend on each other."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..layers.common.regions import CellSet, RegionLayout, RegionPlan, pool_parts
from ..layers.dge.block import DynamicGranularityBlock, Routing
from .tiling import tiled, tokens_per_tile, use_tiling


@tiled
class TiledDynamicGranularityBlock(DynamicGranularityBlock):
    """:class:`~mmtoken.layers.dge.block.DynamicGranularityBlock` for CPU inference."""

    def forward(self, x: Tensor, layout: RegionLayout, routing: Routing | None = None) -> Tensor:
        if routing is None or not use_tiling(self, x):
            return super().forward(x, layout, routing)
        plan, keys = routing.plan, self.attn.keys(self.norm1(x), layout)
        updates = self.block_update(pool_by_granularity(x, plan), plan.queries, keys)
        return add_unpooled(x, updates, plan)

    def block_update(
        self,
        queries: Tensor,
        cells: CellSet,
        keys: Tensor,
        keep: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        if not use_tiling(self, queries):
            return super().block_update(queries, cells, keys, keep)
        out = torch.empty_like(queries)
        for image, part, tile in cell_tiles(cells, tokens_per_tile(self.feedforward_channels // 4)):
            out[part] = super().block_update(queries[part], tile, keys[image : image + 1])
        return out


def pool_by_granularity(x: Tensor, plan: RegionPlan) -> Tensor:
    """:func:`~mmtoken.layers.common.regions.pool_regions` without a copy of the finest cells."""
    parts = pool_parts(x, plan.queries.layout)
    queries = x.new_empty(len(plan.queries.cells), x.shape[-1])
    for image, k, part, places in plan.queries.levels():
        torch.index_select(parts[k][image], 0, places, out=queries[part])
    return queries


def add_unpooled(x: Tensor, updates: Tensor, plan: RegionPlan) -> Tensor:
    """``x + unpool_regions(updates, plan)``, without a dense map of updates."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    step = tokens_per_tile(x.shape[-1])
    parts = (t.split(step) for t in (x.flatten(0, 1), plan.owner, out.flatten(0, 1)))
    for tokens, owner, result in zip(*parts, strict=True):
        torch.add(tokens, updates.index_select(0, owner), out=result)
    return out


def cell_tiles(cells: CellSet, length: int) -> Iterator[tuple[int, slice, CellSet]]:
    """Parts of at most ``length`` cells of one image: the image, the part, and its cells."""
    start = 0
    for image, num_cells in enumerate(cells.lengths):
        end = start + num_cells
        for first in range(start, end, length):
            part = slice(first, min(first + length, end))
            tile = cells._replace(cells=cells.cells[part], counts=[[part.stop - first]])
            yield image, part, tile
        start = end
