"""A stage of PVT whose blocks have dynamic granularity.

Sources: DGE, arXiv 2301.03831, and PVT, arXiv 2102.12122, section 3.2. Parameter names are the
official ones, without the numbers of the stages.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from ..common.padding import padding_regions
from ..common.positions import resample
from ..common.regions import RegionLayout
from ..common.stem import PatchEmbed
from ..common.utils import run_block, trunc_normal_parameter
from .block import DynamicGranularityBlock
from .shared_router import SharedRouter


class Decisions(NamedTuple):
    """What the blocks of a stage chose, as the budget needs it.

    Attributes:
        layout: Of the regions.
        padding: Regions that are padding, ``(B, Hr, Wr)``; None if not looked for.
        gates: Of each block with a router, ``(B, Hr, Wr, K)``.
        scores: Of a router that blocks share, ``(B, Hr, Wr, K)``; None without one.
    """

    layout: RegionLayout
    padding: Tensor | None
    gates: list[Tensor]
    scores: Tensor | None = None


def run_blocks(
    blocks: Sequence[DynamicGranularityBlock],
    x: Tensor,
    layout: RegionLayout,
    padding: Tensor | None,
    with_cp: bool = False,
    router: SharedRouter | None = None,
) -> tuple[Tensor, Decisions]:
    """Route and run some blocks with the same regions.

    Args:
        blocks: The blocks.
        x: Tokens, ``(B, N, C)``.
        layout: Of the regions.
        padding: Regions that are padding, ``(B, Hr, Wr)``, or None.
        with_cp: Recompute the activations of each block in backward; choices are kept.
        router: Chooses once, for all blocks, instead of a router in each.

    Returns:
        Tokens, ``(B, N, C)``, and what was chosen.
    """
    gates, shared, scores = [], None, None
    if router is not None:
        shared, scores = router(x, layout, padding, len(blocks))
    for block in blocks:
        routing = block.route(x, layout, padding) if shared is None else shared
        x = run_block(block, x, layout, routing, recompute=with_cp)
        if routing is not None:
            gates.append(routing.gates)
    return x, Decisions(layout, padding, gates, scores)


class DynamicGranularityStage(nn.Module):
    """A stage of a pyramid: patch embedding, position embedding, blocks.

    Args:
        in_channels: Channels of the input map.
        patch_size: Side of the patch that becomes a token, in places of that map.
        stride: Of the tokens, in pixels.
        pos_grid: ``(H, W)`` of the position embedding, in tokens.
        blocks: The blocks, with the same granularities.
        cls_token: Whether there is a class token, in front.
        with_cp: Recompute the activations of each block in backward; choices are kept.
        router: What the blocks share, if they have no routers of their own.
    """

    def __init__(
        self,
        in_channels: int,
        patch_size: int,
        stride: int,
        pos_grid: tuple[int, int],
        blocks: Iterable[DynamicGranularityBlock],
        cls_token: bool = False,
        with_cp: bool = False,
        router: SharedRouter | None = None,
    ) -> None:
        super().__init__()
        self.router = router
        self.blocks = nn.ModuleList(blocks)
        self.stride = stride
        self.pos_grid = pos_grid
        self.with_cp = with_cp
        dims = self.blocks[0].embed_dims
        self.patch_embed = PatchEmbed(dims, in_channels, patch_size)
        self.cls_token = trunc_normal_parameter(1, 1, dims) if cls_token else None
        self.pos_embed = trunc_normal_parameter(1, math.prod(pos_grid) + cls_token, dims)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor, Decisions]:
        """Run the stage.

        Args:
            x: ``(B, in_channels, H, W)``, any H and W.
            valid: Size of each image without padding, from
                :func:`~mmtoken.layers.common.padding.valid_size`; None treats padding as image.

        Returns:
            Tokens on their grid, ``(B, ceil(H / patch_size), ceil(W / patch_size), C)``, the class
            token, ``(B, 0 or 1, C)``, and what was chosen.
        """
        x = self.patch_embed(x)  # B, H, W, C
        grid, num_prefix_tokens = (x.shape[1], x.shape[2]), int(self.cls_token is not None)
        prefix, position = self.pos_embed.tensor_split([num_prefix_tokens], dim=1)
        x = (x + resize_position(position, self.pos_grid, grid)).flatten(1, 2)  # B, H * W, C
        if self.cls_token is not None:
            cls_token = (self.cls_token + prefix).expand(len(x), -1, -1).to(x)
            x = torch.cat([cls_token, x], dim=1)  # B, N, C
        layout = self.blocks[0].layout(grid, num_prefix_tokens, x.device)
        padding = None if valid is None else padding_regions(valid, self.stride, layout)
        x, decisions = run_blocks(self.blocks, x, layout, padding, self.with_cp, self.router)
        return x[:, num_prefix_tokens:].unflatten(1, grid), x[:, :num_prefix_tokens], decisions


def resize_position(position: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Bilinear, as in PVT: ``(1, old rows * columns, C) -> (1, *new, C)``."""
    return resample(position, old, new, 'bilinear', False)
