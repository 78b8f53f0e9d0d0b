"""A stage of blocks that share attention maps in groups.

Source: PSViT, arXiv 2108.03428.
"""

from collections.abc import Sequence

import torch
import torch.nn as nn
from torch import Tensor

from ..common.old_tiles import tokens_per_tile, use_tiling
from ..common.utils import run_block
from ..common.vit import ViTBlock
from .shared_attention import Sharing, keeps_map
from .sharing import GroupAttention, SharedMapBlock
from .windows import Pieces, cut_windows

CPU = torch.device('cpu')


class SharingStage(nn.Module):
    """Blocks on a grid of one size, in groups that share an attention map.

    Args:
        embed_dims: Channels.
        num_heads: Attention heads.
        groups: Blocks of each group. All but the first of a group are
            :class:`~mmtoken.layers.psvit.sharing.SharedMapBlock`.
        feedforward_channels: Hidden channels of the MLPs.
        qkv_bias: Biases for queries, keys and values.
        drop_path: Stochastic depth rate of each block.
        window_size: Side of the windows that bound attention, in tokens; None for none.
        sharing: As for :func:`~mmtoken.layers.psvit.shared_attention.shared_attention`.
        max_map_tokens: Tokens of a window from which on ``sharing='map'`` refuses to work.
        pool: What makes this stage's tokens of the last one's; None for nothing.
        with_cp: Recompute activations in backward, group by group.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        groups: Sequence[int],
        feedforward_channels: int,
        qkv_bias: bool = True,
        drop_path: Sequence[float] = (),
        window_size: int | None = None,
        sharing: Sharing = 'auto',
        max_map_tokens: int = 4096,
        pool: nn.Module | None = None,
        with_cp: bool = False,
    ) -> None:
        super().__init__()
        self.built_groups = self.groups = tuple(groups)
        self.embed_dims = embed_dims
        self.num_heads = num_heads
        self.window_size = window_size
        self.sharing = sharing
        self.max_map_tokens = max_map_tokens
        self.with_cp = with_cp
        self.pool = pool or nn.Identity()
        types = [t for size in groups for t in (ViTBlock, *[SharedMapBlock] * (size - 1))]
        rates = drop_path or [0.0] * len(types)
        self.blocks = nn.ModuleList(
            block_type(embed_dims, num_heads, feedforward_channels, qkv_bias, rate)
            for block_type, rate in zip(types, rates, strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Run the blocks.

        Args:
            x: Tokens on a grid, ``(B, H, W, C)``, any H and W; those of the last stage if there is
                a ``pool``.

        Returns:
            ``(B, H, W, C)``, H and W as ``pool`` makes them.

        Raises:
            ValueError: ``sharing='map'`` and more than ``max_map_tokens``.
        """
        x = self.pool(x)
        grid = (x.shape[1], x.shape[2])
        self.check_map(grid, len(x), x.dtype)
        cut = cut_windows(grid, self.window_size, x.device)
        x = cut.to_windows(x.flatten(1, 2))
        run = self.run_in_tiles if use_tiling(x, self.training, self.blocks) else self.run
        return cut.to_grid(run(x, cut.pieces)).unflatten(1, grid)

    def run(self, x: Tensor, pieces: Pieces) -> Tensor:
        """The blocks, group after group: ``(B, N, C) -> (B, N, C)``."""
        start = 0
        for size in self.groups:
            group = self.blocks[start : start + size]
            x = run_block(self.run_group, group, x, pieces, recompute=self.with_cp)
            start += size
        return x

    def run_in_tiles(self, x: Tensor, pieces: Pieces) -> Tensor:
        """:meth:`run`, for inference, a few windows at a time through all blocks."""
        tiles = []
        parts = x.split([number * length for number, length in pieces], dim=1)
        for piece, (number, length) in zip(parts, pieces, strict=True):
            windows = piece.unflatten(1, (number, length)).flatten(0, 1)
            split = windows.split(self.tile_windows(length))
            done = [self.run(tile, ((1, length),)) for tile in split]
            tiles.append(torch.cat(done).view_as(piece))
        return torch.cat(tiles, dim=1)

    def run_group(self, group: Sequence[ViTBlock], x: Tensor, pieces: Pieces) -> Tensor:
        """Blocks that share the map of the first: ``(B, N, C) -> (B, N, C)``."""
        batch, length = x.shape[:2]
        sharing = self.sharing if len(group) > 1 else None
        # With one piece, no other map is in use.
        shared = GroupAttention(batch, pieces, sharing, overwrite=len(pieces) == 1)
        tokens, lengths = x.flatten(0, 1), [length] * batch
        for i, block in enumerate(group):
            attend = shared.follow if i else shared.lead
            tokens = block(tokens, attend, lengths)
        return tokens.unflatten(0, (batch, length))

    def set_groups(self, groups: Sequence[int] | None) -> None:
        """Run only the first blocks, in other groups, until told otherwise.

        Args:
            groups: Blocks of each group; None for those the stage was built with.

        Raises:
            ValueError: More blocks than there are, none, or a first one that has no map of its own.
        """
        groups = self.built_groups if groups is None else tuple(groups)
        first = [sum(groups[:i]) for i in range(len(groups))]
        if not groups or min(groups) < 1 or sum(groups) > len(self.blocks):
            raise ValueError(
                f'groups of 1 or more blocks, {len(self.blocks)} at most in all, got {groups}'
            )
        if any(isinstance(self.blocks[i], SharedMapBlock) for i in first):
            raise ValueError(
                f'a group must begin with a block that has a map of its own, got {groups} for a '
                f'stage built with {self.built_groups}; one built with sharing=None takes any'
            )
        self.groups = groups

    def check_map(self, grid: tuple[int, int], batch: int, dtype: torch.dtype) -> None:
        """Refuse maps that are too large to be kept.

        Raises:
            ValueError: More than ``max_map_tokens``, if a map is to be kept whatever its size.
        """
        if self.sharing != 'map' or max(self.groups) == 1:
            return
        longest = max(length for _, length in cut_windows(grid, self.window_size, CPU).pieces)
        if longest <= self.max_map_tokens:
            return
        size = self.map_bytes(grid, batch, dtype, self.training) / 2**20
        raise ValueError(
            f'the map of {longest} tokens, of a grid of {grid[0]} x {grid[1]}, is too large to be '
            f'kept ({size:.0f} MiB a group, of {batch} images): max_map_tokens is '
            f"{self.max_map_tokens}. Set window_sizes, sharing='query_key', or take smaller images"
        )

    def map_bytes(
        self,
        grid: tuple[int, int],
        batch: int = 1,
        dtype: torch.dtype = torch.float32,
        training: bool = False,
    ) -> int:
        """Bytes of the map that a group keeps on a CPU, 0 if none; see ``PSViT.map_bytes``."""
        if max(self.groups) == 1:
            return 0
        elements = []
        for number, length in cut_windows(grid, self.window_size, CPU).pieces:
            windows = batch * number
            if not training:
                windows = min(windows, self.tile_windows(length))
            kept = keeps_map(self.sharing, length, CPU, training)
            elements.append(kept * windows * self.num_heads * length**2)
        return dtype.itemsize * (sum(elements) if training else max(elements))

    def tile_windows(self, length: int) -> int:
        """Windows of ``length`` tokens in a tile."""
        return max(1, tokens_per_tile(self.embed_dims) // length)
