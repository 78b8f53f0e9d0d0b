"""PSViT's stages, a few windows at a time through all blocks."""

import torch
from torch import Tensor

from ..layers.psvit.sharing import SharingStage
from ..layers.psvit.windows import RaggedWindows
from .tiling import tiled, tokens_per_tile, use_tiling


@tiled
class TiledSharingStage(SharingStage):
    """:class:`~mmtoken.layers.psvit.sharing.SharingStage` for CPU inference."""

    def run(self, x: Tensor, windows: RaggedWindows) -> Tensor:
        if not use_tiling(self.blocks, x):  # which the pooling before them is no part of
            return super().run(x, windows)
        groups = []
        sizes = [number * length for number, length in windows.groups]
        for group, (number, length) in zip(x.split(sizes, dim=1), windows.groups, strict=True):
            whole = RaggedWindows(((1, length),), None, None)
            batch = group.unflatten(1, (number, length)).flatten(0, 1)  # (B * number, length, C)
            tiles = batch.split(max(1, tokens_per_tile(x.shape[-1]) // length))
            done = torch.cat([SharingStage.run(self, tile, whole) for tile in tiles])
            groups.append(done.view_as(group))
        return torch.cat(groups, dim=1)
