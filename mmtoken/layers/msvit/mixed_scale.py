"""Tokens of mixed scale: a coarse token, or the fine tokens of its region, never both.

Reduction keeps, of all fine and coarse tokens that a grid can have, those of the scale that each
region chose (:meth:`PackedLayout.pack`). Restoration copies each token to all places of the grid
that it stands for (:meth:`PackedLayout.restore`). A region is the place of a coarse token and of
``ratio ** 2`` fine ones, in the terms of :mod:`~mmtoken.layers.common.regions` a region of a grid
with the granularities 1 and ``ratio``. It chooses once for the whole network.

There are three layouts of packed tokens:

* :class:`PackedLayout`: only the tokens in use are there. For inference.
* :class:`GatedLayout`: likewise, with gates that learn from these tokens.
* :class:`MaskedLayout`: tokens of both scales are there; those not in use are hidden as keys and
  show the gates what using them would change. For training.

Source: MSViT, arXiv 2307.02321.
"""

from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from ...runtime.reference import is_compiling
from ..common.attention import gated_attention, gated_attention_fused, varlen_attention
from ..common.packed import SparseFeatures
from ..common.regions import RegionLayout, all_cells, gate_per_cell, plan_regions
from ..common.rotary import Rotation
from ..common.utils import ceil_div, to_map
from ..common.vit import AttentionFn

FINE = 1  # among prefix, fine and coarse tokens


@dataclass(frozen=True)
class PackedLayout:
    """Which tokens a batch has, which attend to each other, and what they stand for.

    Tokens are packed image after image, M in all, and inside an image window after window. With P
    prefix tokens and H * W places of the grid, an image can have L tokens: prefix, fine, coarse.

    Attributes:
        regions: The grid, its regions and the tokens it can have.
        choice: 1 where a region is coarse, ``(B, Hr, Wr)``.
        index: Which of the ``B * L`` possible tokens each token is, ``(M,)``.
        lengths: Tokens of each image.
        windows: Tokens of each attention window; ``lengths`` without windows.
        owner: The token that stands for each place, prefix first, ``(B, P + H * W)``.
        fine: The places that have a fine token, of the ``B * H * W`` of the batch, ``(m,)``; all
            in ``torch.export``, where m is not known.
    """

    regions: RegionLayout
    choice: Tensor
    index: Tensor
    lengths: list[int]
    windows: list[int]
    owner: Tensor
    fine: Tensor

    @property
    def num_places(self) -> int:
        """``B * H * W``."""
        return len(self.choice) * len(self.regions.token_region)

    @property
    def grid(self) -> tuple[int, int]:
        """``(H, W)``, in fine tokens."""
        return self.regions.grid

    def pack(self, tokens: Tensor) -> Tensor:
        """Keep the tokens that are there: ``(B, L, C) -> (M, C)``."""
        return tokens.flatten(0, 1).index_select(0, self.index)

    @cached_property
    def rotation(self) -> Rotation | None:
        """Of queries and keys, where positions are rotary."""
        rotation = self.regions.rotation
        if rotation is None:
            return None
        return rotation.of(self.index % self.regions.num_cells_total)

    def restore(self, tokens: Tensor) -> Tensor:
        """Copy tokens to all places they stand for: ``(M, C) -> (B, P + H * W, C)``."""
        dense = tokens.index_select(0, self.owner.flatten())
        return dense.unflatten(0, tuple(self.owner.shape))

    def attn_fn(self, windowed: bool) -> AttentionFn:
        """Attention between the tokens of an image, or of a window: ``(M, heads, d)`` each."""
        return partial(varlen_attention, lengths=self.windows if windowed else self.lengths)

    def to_features(self, tokens: Tensor) -> SparseFeatures:
        """Hand tokens ``(M, C)`` to a neck, where :func:`restore_features` restores the map.

        The layout of the features has, for each place of the grid, its token and whether that is
        coarse: ``(B, 2, H * W)``.
        """
        owner = self.owner[:, self.regions.num_prefix_tokens :]
        coarse = self.choice.flatten(1)[:, self.regions.token_region]
        lengths = torch.tensor(self.lengths).to(tokens.device, non_blocking=True)
        return SparseFeatures(tokens, lengths, torch.stack([owner, coarse], dim=1), self.grid)


@dataclass(frozen=True)
class GatedLayout(PackedLayout):
    """Tokens in use, each with a gate that is 1 and has a gradient.

    Attributes:
        gate: ``(M,)``.
    """

    gate: Tensor

    def apply_gate(self, tokens: Tensor) -> Tensor:
        """Multiply tokens ``(M, C)`` by their gates, which teaches the gates what maps need."""
        return tokens * self.gate.to(tokens.dtype)[:, None]

    def restore(self, tokens: Tensor) -> Tensor:
        return super().restore(self.apply_gate(tokens))

    def attn_fn(self, windowed: bool) -> AttentionFn:
        lengths = self.windows if windowed else self.lengths
        return partial(gated_attention_fused, gate=self.gate, lengths=lengths)

    def to_features(self, tokens: Tensor) -> SparseFeatures:
        return super().to_features(self.apply_gate(tokens))


@dataclass(frozen=True)
class MaskedLayout(GatedLayout):
    """Tokens of both scales everywhere; the gate of those not in use is 0.

    A place has a fine and a coarse token, of which one counts.

    Attributes:
        coarse_owner: The coarse token of each place of the grid, ``(B, H * W)``; ``owner`` has the
            fine ones.
    """

    coarse_owner: Tensor

    def restore(self, tokens: Tensor) -> Tensor:
        tokens = self.apply_gate(tokens)
        prefix, fine = PackedLayout.restore(self, tokens).split(
            [self.regions.num_prefix_tokens, self.coarse_owner.shape[1]], dim=1
        )
        coarse = tokens.index_select(0, self.coarse_owner.flatten()).view_as(fine)
        return torch.cat([prefix, fine + coarse], dim=1)

    def attn_fn(self, windowed: bool) -> AttentionFn:
        lengths = self.windows if windowed else self.lengths
        return partial(gated_attention, gate=self.gate, lengths=lengths)

    def to_features(self, tokens: Tensor) -> SparseFeatures:
        """The restored map itself, since not all tokens are in use."""
        dense = self.restore(tokens)[:, self.regions.num_prefix_tokens :]
        batch, places = dense.shape[:2]
        owner = torch.arange(batch * places, device=tokens.device).view(batch, places)
        coarse = self.choice.flatten(1)[:, self.regions.token_region]
        lengths = torch.full((batch,), places, device=tokens.device)
        layout = torch.stack([owner, coarse], dim=1)
        return SparseFeatures(dense.flatten(0, 1), lengths, layout, self.grid)


def restore_features(features: SparseFeatures) -> tuple[Tensor, Tensor]:
    """The map that :meth:`PackedLayout.to_features` stands for.

    Returns:
        The map, ``(B, C, H, W)``, and where it was coarse, ``(B, 1, H, W)``, 0 or 1, of its dtype.
    """
    owner, coarse = features.layout.unbind(1)
    tokens = features.tokens.index_select(0, owner.flatten()).view(*owner.shape, -1)
    coarse = coarse.unflatten(1, features.grid).unsqueeze(1).to(tokens.dtype)
    return to_map(tokens.unflatten(1, features.grid)), coarse


# Not to be traced: how many tokens there are depends on values, and torch 2.11 cannot carry the
# result from one graph to the next.
@torch.compiler.disable
def build_layout(
    gates: Tensor, regions: RegionLayout, window: int | None = None, masked: bool = False
) -> PackedLayout:
    """Lay out the tokens that regions choose. Waits for the device once, or twice with windows.

    Args:
        gates: One-hot choices, fine and coarse, ``(B, Hr, Wr, 2)``.
        regions: Of the grid.
        window: Side of an attention window, in regions; None for none.
        masked: If the gates have a gradient, keep the tokens that are not in use.

    Returns:
        :class:`PackedLayout`; if the gates have a gradient, one of the other two.
    """
    choice = gates.argmax(dim=-1)
    learning = gates.requires_grad
    masked = masked and learning
    batch, device = len(gates), gates.device
    if masked:
        cells = all_cells(regions, batch)
        first = torch.arange(batch, device=device)[:, None] * regions.num_cells_total
        owner, coarse_owner = (first + cell for cell in regions.cell_of_token)
    else:
        cells, owner = plan_regions(choice, regions)
        owner = owner.view(batch, -1)
    index, lengths, windows = cells.cells, cells.lengths, cells.lengths
    num_places = len(regions.token_region)
    if is_compiling():
        fine = [torch.arange(num_places, device=device)]
    else:
        fine = [i * num_places + place for i, level, _, place in cells.levels() if level == FINE]
    if window is not None:
        order, windows = order_by_windows(index, regions, window, batch)
        index, place = index[order], order.argsort()
        owner = place[owner]
        if masked:
            coarse_owner = place[coarse_owner]
    layout = (regions, choice, index, lengths, windows, owner, torch.cat(fine))
    if not learning:
        return PackedLayout(*layout)
    gate = gate_per_cell(gates, regions).flatten().index_select(0, index)
    if not masked:
        return GatedLayout(*layout, gate)
    return MaskedLayout(*layout, gate, coarse_owner[:, regions.num_prefix_tokens :])


def fine_layout(regions: RegionLayout, batch: int, window: int | None = None) -> PackedLayout:
    """Fine tokens everywhere, of a grid whose only granularity is 1."""
    choice = torch.zeros(batch, *regions.shape, dtype=torch.long, device=regions.level.device)
    gates = torch.nn.functional.one_hot(choice, len(regions.granularities)).float()
    return build_layout(gates, regions, window)


def order_by_windows(
    index: Tensor, regions: RegionLayout, window: int, batch: int
) -> tuple[Tensor, list[int]]:
    """Sort tokens by window, so that each window of an image is a sequence.

    Windows at the bottom and right borders are smaller if regions do not fill them.

    Args:
        index: Tokens among the ``B * L`` possible ones, ``(M,)``, without prefix tokens, which are
            in no window.
        regions: Of the grid.
        window: Side of a window, in regions.
        batch: Images.

    Returns:
        Places in ``index``, window after window, ``(M,)``, and the tokens of each window.
    """
    rows, columns = (ceil_div(side, window) for side in regions.shape)
    row, column = (torch.arange(side, device=index.device) // window for side in regions.shape)
    window_of_region = (row[:, None] * columns + column).flatten()
    image, cell = index // regions.num_cells_total, index % regions.num_cells_total
    windows = image * (rows * columns) + window_of_region[regions.region[cell]]
    # bincount() would wait for the device.
    counts = windows.new_zeros(batch * rows * columns)
    counts.scatter_add_(0, windows, torch.ones_like(windows))
    return windows.argsort(stable=True), counts.tolist()
