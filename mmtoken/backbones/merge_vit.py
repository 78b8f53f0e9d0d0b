"""Token merging for plain ViTs, without training.

Source: MPM, arXiv 2604.05718; see :mod:`~mmtoken.layers.merge.mutual_pairs`. Parameter names are
timm's.
"""

import math
from collections.abc import Iterable, Mapping

import torch.nn as nn
from torch import Tensor

from ..arguments import as_tuple, is_number
from ..layers.common.vit import ViTBlock
from ..layers.merge.mutual_pairs import (
    MergedLayout,
    merge_mutual_pairs,
    unmerge,
    unmerged_layout,
)
from ..registry import MODELS
from ..runtime.decisions import TokenGroups, record_groups
from .vit_base import TRUNK_OPTIONS, TRUNKS, DenseLayout, PlainBackbone


@MODELS.register_module()
class MergeViT(PlainBackbone):
    """ViT that merges tokens which are alike before some of its blocks.

    There, two tokens of an image that are each other's nearest neighbor in cosine similarity become
    one, their average. A token stands for the places of all patches that went into it: each output
    is copied back to them, so that dense maps are complete and of the size that ViT's have. There
    are no parameters beyond ViT's and nothing has to be trained: any weights of a plain ViT can be
    used. How many tokens are left depends on the image and the weights; a merge leaves half of them
    at least.

    Not specified in what we know of the paper and therefore our choice: pairs are found before the
    block's norm; blocks count from 0, as in ``out_indices``.

    Padding: the padding of a batch is treated like the image. Its tokens are alike and merge, but
    attention sees them and positions are resampled to the padded grid, so the maps of an image
    differ, everywhere, from those it has alone.

    Args:
        arch: ``'tiny'``, ``'small'``, ``'base'``, ``'large'``, or a dict with the keys
            ``embed_dims``, ``num_layers``, ``num_heads`` and ``feedforward_channels``.
        merge_blocks: Blocks before which tokens merge, negative ones counted from the end. ``()``
            gives the dense twin: ViT.
        least_tokens: Tokens over patches that are left behind the last merge, at least; merges
            before it leave accordingly more. The pairs that are most alike merge first. 0 merges
            all pairs.
        proportional: Attention in which a key that stands for n patches counts n times.
        cls_token: Whether there is a class token, as in most weights.
        kwargs: As for :class:`~mmtoken.backbones.vit_base.PlainBackbone`.

    Raises:
        ValueError: Bad argument values; the message says what is allowed.
        TypeError: ``arch`` is neither a name nor a dict.

    Example:
        >>> import torch
        >>> arch = dict(embed_dims=32, num_layers=4, num_heads=2, feedforward_channels=64)
        >>> backbone = MergeViT(arch, merge_blocks=(1, 2)).eval()
        >>> backbone(torch.rand(1, 3, 64, 96))[0].shape
        torch.Size([1, 32, 4, 6])
    """

    twin_args = dict(merge_blocks=())
    arch_options = TRUNK_OPTIONS
    arch_zoo = PlainBackbone.arch_zoo | TRUNKS

    def __init__(
        self,
        arch: str | Mapping = 'small',
        merge_blocks: int | Iterable[int] = (2, 5),
        least_tokens: float = 0.0,
        proportional: bool = True,
        cls_token: bool = True,
        **kwargs,
    ) -> None:
        super().__init__(arch, cls_token=cls_token, **kwargs)
        depth, given = self.num_stages, as_tuple(merge_blocks)
        if not set(given) <= set(range(-depth, depth)):
            raise ValueError(f'merge_blocks must be from {-depth} to {depth - 1}, got {given}')
        self.merge_blocks = frozenset(i + depth if i < 0 else i for i in given)
        if not is_number(least_tokens) or not 0 <= least_tokens <= 1:
            raise ValueError(f'least_tokens must be from 0 to 1, got {least_tokens!r}')
        self.least_tokens = least_tokens
        self.budget: float | None = None  # of mmtoken.set_budget
        self.proportional = proportional
        self.blocks = nn.ModuleList(
            ViTBlock(**self.block_args, drop_path=rate) for rate in self.drop_rates
        )
        self.finish_init()

    @property
    def least_budget(self) -> float | None:
        """Tokens over patches if every token found a partner; None for the dense twin."""
        return 0.5 ** len(self.merge_blocks) if self.merge_blocks else None

    def least_behind(self, index: int, grid: tuple[int, int]) -> int:
        """Tokens that are left at least behind the merge before a block."""
        share = self.least_tokens if self.budget is None else self.budget
        if not share:
            return 0
        merged = sum(block <= index for block in self.merge_blocks) / len(self.merge_blocks)
        return math.ceil(share**merged * math.prod(grid))

    def run_block(
        self, index: int, tokens: Tensor, layout: DenseLayout | MergedLayout
    ) -> tuple[Tensor, DenseLayout | MergedLayout]:
        if index in self.merge_blocks:
            if isinstance(layout, DenseLayout):
                layout = unmerged_layout(
                    layout.grid, self.num_prefix_tokens, len(tokens), tokens.device, layout.rotation
                )
                tokens = tokens.flatten(0, 1)  # (B, L, C) -> (M, C)
            # Outside of what is recomputed, which then has the same pairs
            least = self.least_behind(index, layout.grid)
            tokens, layout = merge_mutual_pairs(tokens, layout, least)
            owner = layout.owner[:, self.num_prefix_tokens :].unflatten(1, layout.grid)
            record_groups(lambda: TokenGroups(f'merged before block {index}', owner))
        if isinstance(layout, DenseLayout):
            return super().run_block(index, tokens, layout)
        attn_fn = layout.attn_fn(self.proportional)
        return self.checkpoint(self.blocks[index], tokens, attn_fn, layout.lengths), layout

    def restore(self, index: int, tokens: Tensor, layout: DenseLayout | MergedLayout) -> Tensor:
        return tokens if isinstance(layout, DenseLayout) else unmerge(tokens, layout)
