"""Tokens of mixed scale: a coarse token, or the fine tokens of its region, never both.

Fine tokens are those of the grid, and a coarse token stands for a region of them: in the terms of
:mod:`~mmtoken.layers.common.regions`, a grid with the granularities 1 and r whose regions have the side r.
Regions choose once for the whole network, so one :class:`MixedScaleLayout` serves all its layers and
restores a dense map behind any of them, copying each coarse token to all places of its region.

Source: MSViT, arXiv 2307.02321.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..common.attention import gated_attention, gated_attention_fused, varlen_attention
from ..common.packed import SparseFeatures
from ..common.regions import (
    CellSet,
    RegionLayout,
    all_cells,
    gate_per_cell,
    plan_regions,
    unpool_every_granularity,
)
from ..common.utils import to_map


class MixedScaleLayout(NamedTuple):
    """Which tokens of a batch there are, which attend to each other, and what they stand for.

    Of the regions, L is the number of fine and coarse tokens together, and N that of the fine
    ones, both with extra tokens. Tokens are packed image after image, M in all, and in an image
    window after window.

    Attributes:
        cells: The tokens, before they are ordered by windows.
        choice: 1 where a region is coarse, ``(B, Hr, Wr)``; None if nothing was chosen.
        owner: The token that stands for each fine one, ``(B * N,)``; None if all L are there.
        gate: 1 for tokens in use and 0 for others, with a gradient, ``(M,)``; None if only tokens
            in use are there and nothing learns to choose them.
        order: The cell of each token, ``(M,)``; None without windows.
        windows: Tokens of each window; None without windows.
    """

    cells: CellSet
    choice: Tensor | None
    owner: Tensor | None
    gate: Tensor | None
    order: Tensor | None
    windows: list[int] | None

    @property
    def lengths(self) -> list[int]:
        """Tokens of each image."""
        return self.cells.lengths

    def pack(self, tokens: Tensor) -> Tensor:
        """Order tokens of cells, ``(M, C)``, by windows."""
        return tokens if self.order is None else tokens.index_select(0, self.order)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, windowed: bool) -> Tensor:
        """Attention between the tokens of an image, or of a window.

        Args:
            query, key, value: ``(M, heads, d)``.
            windowed: Whether windows bound it.

        Returns:
            ``(M, heads, d)``.
        """
        lengths = self.windows if windowed else self.lengths
        if self.gate is None:
            return varlen_attention(query, key, value, lengths)
        gated = gated_attention_fused if self.owner is not None else gated_attention
        return gated(query, key, value, self.gate, lengths)

    def apply_gate(self, tokens: Tensor) -> Tensor:
        """Multiply tokens ``(M, C)`` by their gates, which teaches the gates what maps need."""
        return tokens if self.gate is None else tokens * self.gate.to(tokens.dtype)[:, None]

    def restore(self, tokens: Tensor) -> Tensor:
        """Copy tokens to all places they stand for: ``(M, C) -> (B, N, C)``, extra ones first."""
        batch, tokens = len(self.lengths), self.apply_gate(tokens)
        if self.owner is not None:
            return tokens.index_select(0, self.owner).unflatten(0, (batch, -1))
        if self.order is not None:
            tokens = tokens.index_select(0, _inverse(self.order))
        return unpool_every_granularity(tokens.unflatten(0, (batch, -1)), self.cells.regions)

    def features(self, tokens: Tensor) -> SparseFeatures:
        """Hand tokens ``(M, C)`` on to a neck, which :func:`restore_map` there.

        The layout has for each place of the grid its token and whether that is coarse:
        ``(B, 2, H * W)``. Where tokens are there that are not in use the map goes instead.
        """
        regions, batch = self.cells.regions, len(self.lengths)
        if self.owner is None:
            tokens = self.restore(tokens)[:, regions.num_prefix_tokens :]
            lengths = [tokens.shape[1]] * batch
            tokens = tokens.flatten(0, 1)
            owner = torch.arange(len(tokens), device=tokens.device).view(batch, -1)
        else:
            tokens, lengths = self.apply_gate(tokens), self.lengths
            owner = self.owner.view(batch, -1)[:, regions.num_prefix_tokens :]
        coarse = torch.zeros_like(owner)
        if self.choice is not None:
            coarse = self.choice.flatten(1)[:, regions.token_region]
        layout = torch.stack([owner, coarse], dim=1)
        lengths = torch.tensor(lengths).to(tokens.device, non_blocking=True)
        return SparseFeatures(tokens, lengths, layout, regions.grid)


def restore_map(features: SparseFeatures) -> tuple[Tensor, Tensor]:
    """The map ``(B, C, H, W)`` that :meth:`MixedScaleLayout.features` stands for.

    Returns:
        The map, and where it was coarse: ``(B, 1, H, W)``, 0 or 1, of the map's kind.
    """
    owner, coarse = features.layout.unbind(1)
    tokens = features.tokens.index_select(0, owner.flatten()).view(*owner.shape, -1)
    coarse = coarse.unflatten(1, features.grid).unsqueeze(1).to(tokens.dtype)
    return to_map(tokens.unflatten(1, features.grid)), coarse


def mix_all(regions: RegionLayout, batch: int, window: int | None = None) -> MixedScaleLayout:
    """All tokens of all scales that the regions can have, all in use.

    Args:
        regions: Of the grid.
        batch: Images.
        window: Side of a window, in regions; None for none.
    """
    cells = all_cells(regions, batch)
    return MixedScaleLayout(cells, None, None, None, *order_by_windows(cells, window))


# Not to be traced: how many tokens there are depends on values, and torch 2.11 cannot carry the
# result from one graph to the next.
@torch.compiler.disable
def build_layout(
    gates: Tensor, regions: RegionLayout, window: int | None = None, keep_hidden: bool = False
) -> MixedScaleLayout:
    """Mix scales as regions choose. Waits for the device once, or twice with windows.

    Args:
        gates: One-hot choices, fine and coarse, ``(B, Hr, Wr, 2)``.
        regions: Of the grid.
        window: Side of a window, in regions; None for none.
        keep_hidden: If the gates have a gradient, let tokens be there that are not in use: no key
            to the others, but it shows what using them would change.
    """
    choice = gates.argmax(dim=-1)
    learning = gates.requires_grad and torch.is_grad_enabled()
    if learning and keep_hidden:
        everything = mix_all(regions, len(gates), window)
        gate = gate_per_cell(gates, regions).flatten(0, 1)
        return everything._replace(choice=choice, gate=everything.pack(gate).flatten())
    cells, owner = plan_regions(choice, regions)
    order, windows = order_by_windows(cells, window)
    mixture = MixedScaleLayout(cells, choice, owner, None, order, windows)
    if order is not None:
        mixture = mixture._replace(owner=_inverse(order)[owner])
    if learning:
        gate = gate_per_cell(gates, regions).flatten(0, 1).index_select(0, cells.cells)
        mixture = mixture._replace(gate=mixture.pack(gate).flatten())
    return mixture


@torch.compiler.disable
def order_by_windows(
    cells: CellSet, window: int | None
) -> tuple[Tensor, list[int]] | tuple[None, None]:
    """Sort cells by window, so that each window of an image is a sequence.

    Windows at the bottom and right borders are smaller if regions do not fill them.

    Args:
        cells: Without extra tokens, which are in no window.
        window: Side of a window, in regions; None for none.

    Returns:
        The cell in each place, ``(M,)``, and how many each window has, image after image. Both
        None without windows.
    """
    if window is None:
        return None, None
    regions = cells.regions
    rows, columns = (-(-side // window) for side in regions.shape)
    row, column = (
        torch.arange(side, device=cells.cells.device) // window for side in regions.shape
    )
    window_of_region = (row[:, None] * columns + column).flatten()
    place = cells.cells % regions.num_cells_total
    windows = cells.image * (rows * columns) + window_of_region[regions.region[place]]
    counts = torch.bincount(windows, minlength=len(cells.counts) * rows * columns)
    return windows.argsort(stable=True), counts.tolist()


def _inverse(order: Tensor) -> Tensor:
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
