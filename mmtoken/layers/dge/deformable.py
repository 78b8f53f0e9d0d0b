"""Deformable attention of packed queries to a dense map.

Source: Deformable DETR, arXiv 2010.04159, section 4.1, at a single scale, as in the DPVT of the
released code of DGE (github.com/StevenGrove/vtpack, Apache-2.0).
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..common.regions import CellSet, RegionLayout

# Share of the gradient that flows through the sampling positions, in the released code.
OFFSET_GRADIENT = 0.1


class DeformableAttention(nn.Module):
    """Each query samples the map at a few positions per head; the output is their weighted sum.

    Args:
        embed_dims: Channels, C.
        num_heads: Attention heads.
        num_points: Positions per head.
    """

    def __init__(self, embed_dims: int, num_heads: int, num_points: int = 4) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.num_points = num_points
        self.value = nn.Linear(embed_dims, embed_dims)
        self.offsets = nn.Linear(embed_dims, num_heads * num_points * 2)
        self.weights = nn.Linear(embed_dims, num_heads * num_points)
        self.proj = nn.Linear(embed_dims, embed_dims)

    def keys(self, x: Tensor, layout: RegionLayout) -> Tensor:
        """The map to sample from.

        Args:
            x: Normalized tokens of the grid, ``(B, H * W, C)``.
            layout: Of the grid.

        Returns:
            ``(B, heads, d, H, W)``.
        """
        value = self.value(x).unflatten(-1, (self.num_heads, -1)).unflatten(1, layout.grid)
        return value.permute(0, 3, 4, 1, 2).contiguous()

    def forward(self, queries: Tensor, keys: Tensor, cells: CellSet) -> Tensor:
        """Attend.

        Args:
            queries: Packed and normalized, ``(M, C)``.
            keys: From :meth:`keys`.
            cells: The cells of the queries.

        Returns:
            ``(M, C)``.
        """
        offsets = self.offsets(queries).unflatten(-1, (self.num_heads, self.num_points, 2))
        offsets = OFFSET_GRADIENT * offsets + (1 - OFFSET_GRADIENT) * offsets.detach()
        positions = cells.center[:, None, None].to(offsets) + offsets  # M, heads, points, 2
        weights = self.weights(queries).unflatten(-1, (self.num_heads, self.num_points))
        weights = weights.softmax(dim=-1)  # M, heads, points
        images = zip(
            positions.split(cells.lengths), weights.split(cells.lengths), keys, strict=True
        )
        return self.proj(torch.cat([_sample(*image) for image in images]))


def _sample(positions: Tensor, weights: Tensor, value: Tensor) -> Tensor:
    """Weighted sums of a map at positions between its tokens, zero outside.

    Args:
        positions: Column and row, ``(Q, heads, points, 2)``, in tokens.
        weights: ``(Q, heads, points)``.
        value: ``(heads, d, H, W)``.

    Returns:
        ``(Q, heads * d)``.
    """
    height, width = value.shape[-2:]
    sides = torch.tensor([width, height], dtype=positions.dtype, device=positions.device)
    # Token 0 has its center half a token from the edge, which is at -1.
    positions = (2 * positions.transpose(0, 1) + 1) / sides - 1
    sample = F.grid_sample
    if torch.are_deterministic_algorithms_enabled():
        sample = _gather_samples  # of the other, torch has no deterministic gradient on a GPU
    sampled = sample(value, positions.to(value), align_corners=False)
    weights = weights.transpose(0, 1)[:, None].to(sampled)
    return (sampled * weights).sum(dim=-1).permute(2, 0, 1).flatten(1)


def _gather_samples(value: Tensor, positions: Tensor, align_corners: bool) -> Tensor:
    """``F.grid_sample``, bilinear with zeros outside, written out with ``gather``.

    Args:
        value: ``(N, d, H, W)``.
        positions: ``(N, Q, points, 2)``, column and row, from -1 to 1.
        align_corners: Always False: the edges of the outer tokens are -1 and 1, not their centers.

    Returns:
        ``(N, d, Q, points)``.
    """
    height, width = value.shape[-2:]
    column, row = (((positions + 1) * positions.new_tensor([width, height]) - 1) / 2).unbind(-1)
    left, top = column.floor(), row.floor()
    flat, sampled = value.flatten(2), 0
    for x in (left, left + 1):
        for y in (top, top + 1):
            share = (1 - (column - x).abs()) * (1 - (row - y).abs())
            share = share * ((x >= 0) & (x < width) & (y >= 0) & (y < height))
            index = y.clamp(0, height - 1).long() * width + x.clamp(0, width - 1).long()
            found = flat.gather(2, index.flatten(1)[:, None].expand(-1, flat.shape[1], -1))
            sampled = sampled + found.unflatten(2, index.shape[1:]) * share[:, None]
    return sampled
