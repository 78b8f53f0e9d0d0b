"""Blocks of dynamic granularity, tile by tile: queries do not depend on each other."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..layers.common.regions import CellSet
from ..layers.dge.block import DynamicGranularityBlock
from .tiling import tiled, tokens_per_tile, use_tiling


@tiled
class TiledDynamicGranularityBlock(DynamicGranularityBlock):
    """:class:`~mmtoken.layers.dge.block.DynamicGranularityBlock` for CPU inference."""

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
