"""A stage of a pyramid of grained blocks.

Source: PVT, arXiv 2102.12122, section 3.2. Parameter names are the official ones without the
numbers of the stages.
"""

from collections.abc import Iterable

import torch
import torch.nn as nn
from timm.layers import trunc_normal_
from torch import Tensor

from ...losses.usage import Usage
from ..common.padding import padding_regions
from ..common.positions import resample
from ..common.regions import make_region_layout
from ..common.stem import PatchStem
from .block import DynamicGranularityBlock


class DynamicGranularityStage(nn.Module):
    """Patch embedding, position embedding, blocks.

    Args:
        in_channels: Channels of the map that comes in.
        patch_size: Side of the patch that becomes a token, in places of that map.
        stride: Of the tokens, in pixels.
        pos_grid: ``(H, W)`` that the position embedding is laid out for, in tokens.
        blocks: The blocks.
        cls_token: Whether a class token goes first.
    """

    def __init__(
        self,
        in_channels: int,
        patch_size: int,
        stride: int,
        pos_grid: tuple[int, int],
        blocks: Iterable[DynamicGranularityBlock],
        cls_token: bool = False,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.stride = stride
        self.pos_grid = pos_grid
        self.in_channels = in_channels
        self.patch_size = patch_size
        self.embed_dims = dims = self.blocks[0].embed_dims
        self.patch_embed = PatchStem(dims, in_channels, patch_size)
        self.cls_token = nn.Parameter(_small(1, 1, dims)) if cls_token else None
        self.pos_embed = nn.Parameter(_small(1, pos_grid[0] * pos_grid[1] + cls_token, dims))

    def forward(
        self, x: Tensor, valid: Tensor | None = None, measured: bool = True
    ) -> tuple[Tensor, Tensor, list[Usage]]:
        """Run the stage.

        Args:
            x: ``(B, in_channels, H, W)``, any H and W.
            valid: Size of each image without padding, from
                :func:`~mmtoken.layers.common.padding.valid_size`; None counts padding like anything else.
            measured: Whether blocks measure what they use.

        Returns:
            Tokens on their grid, ``(B, ceil(H / patch_size), ceil(W / patch_size), C)``, the class
            token ``(B, 0 or 1, C)``, and what each block with a router used, if measured.
        """
        x = self.patch_embed(x)
        grid = (x.shape[1], x.shape[2])
        num_prefix_tokens = int(self.cls_token is not None)
        extra, position = self.pos_embed.split(
            [num_prefix_tokens, self.pos_embed.shape[1] - num_prefix_tokens], 1
        )
        x = (x + resize_position(position, self.pos_grid, grid)).flatten(1, 2)
        if num_prefix_tokens:
            x = torch.cat([(self.cls_token + extra).expand(len(x), -1, -1).to(x), x], dim=1)
        padding, usages = None, []
        for block in self.blocks:
            if valid is not None and padding is None and block.router is not None:
                regions = make_region_layout(
                    grid, block.granularities, block.region_size, num_prefix_tokens, x.device
                )
                padding = padding_regions(valid, self.stride, regions)
            x, usage = block(x, grid, padding, measured)
            if usage is not None:
                usages.append(usage)
        return x[:, num_prefix_tokens:].unflatten(1, grid), x[:, :num_prefix_tokens], usages


def resize_position(position: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Bilinear, as in PVT: ``(1, old rows * columns, C) -> (1, *new, C)``."""
    return resample(position, old, new, 'bilinear', False)


def _small(*shape: int) -> Tensor:
    return trunc_normal_(torch.empty(shape), std=0.02)
