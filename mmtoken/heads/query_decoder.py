"""The last blocks of a plain ViT, with queries among their tokens that become masks.

Source: EoMT, arXiv 2503.19108, sections 3.2 and 3.3; released code tue-mps/eomt (MIT), from which
the order of tokens, the layers of the mask module and the schedule of annealing are known.
"""

import math
from collections.abc import Mapping
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor

from ..backbones.msvit import MSViT
from ..backbones.vit_base import block_options
from ..checkpoints.module import CheckpointedModule
from ..layers.common.rotary import grid_rotation, rotated
from ..layers.common.utils import (
    drop_path_rates,
    init_own,
    run_block,
    to_map,
    trunc_normal_parameter,
)
from ..layers.common.vit import ViTBlock, full_attention
from .annealing import MaskAnnealing

MASK_STRIDE = 4  # of the masks, in pixels


class QueryDecoder(CheckpointedModule):
    """Queries join the tokens in the last blocks of a plain ViT, and become classes and masks.

    There is neither a pixel decoder nor a transformer decoder: the blocks before are a backbone of
    ours with ``out_indices=(depth - num_blocks - 1,)`` and ``out_prefix=True``, these are the rest
    of the same network. Names of blocks are those that they have in the whole network, so the
    checkpoint of the backbone is the checkpoint of these, too.

    In training, a query attends only to the places of the mask that it predicts before a block,
    and to all queries and prefix tokens. These masks are annealed: from block to block fewer
    queries have one, until testing, where none has, does as training did.

    Args:
        num_classes: Classes; one more means no object.
        arch: As that of the backbone, a name or a dict.
        num_blocks: How many blocks, the last ones of ``arch``, the queries join.
        num_queries: Queries of an image, Q.
        patch_size: Side of a patch, in pixels: a power of two times 4, or 14 (whose masks have a
            stride of 3.5).
        qkv_bias, layer_scale: As those of the backbone.
        drop_path_rate: Of the last block, as that of the backbone.
        annealing: Arguments of :class:`~mmtoken.heads.annealing.MaskAnnealing`; None for no masks
            in attention.
        with_cp: Recompute the activations of each block in backward.
        init_cfg: MMEngine's initialization config; ``dict(type='Pretrained', checkpoint=...)`` with
            the checkpoint of the backbone.

    Raises:
        ValueError: Bad argument values; the message says what is allowed.
        TypeError: ``arch`` is neither a name nor a dict.
    """

    usual_prefix = 'backbone.'  # in the checkpoint of a dense model
    ignorable_keys = rf'{MSViT.ignorable_keys}|(patch_embed|pos_embed|reg_token|blocks\.\d+)(\..*)?'
    newly_initialized_keys = r'(query|classify|embed_mask|upscale|annealing)(\..*)?'

    def __init__(
        self,
        num_classes: int,
        arch: str | Mapping = 'small',
        num_blocks: int = 3,
        num_queries: int = 100,
        patch_size: int = 16,
        qkv_bias: bool = True,
        layer_scale: float | None = None,
        drop_path_rate: float = 0.0,
        annealing: Mapping | None = None,
        with_cp: bool = False,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        arch = MSViT.resolve_arch(arch)
        dims, depth = arch['embed_dims'], arch['num_layers']
        if not 1 <= num_blocks < depth:
            raise ValueError(f'num_blocks must be from 1 to {depth - 1}, got {num_blocks}')
        if num_queries < 1 or num_classes < 1:
            raise ValueError(
                f'num_queries and num_classes must be 1 or more, got {num_queries}, {num_classes}'
            )
        self.arch = arch
        self.num_queries = num_queries
        self.with_cp = with_cp
        options = block_options(arch)
        rates = drop_path_rates(drop_path_rate, [depth])[0]
        self.blocks = nn.ModuleDict(
            {
                str(i): ViTBlock(
                    dims, arch['num_heads'], arch['feedforward_channels'], qkv_bias,
                    drop_path=rates[i], layer_scale=layer_scale, **options,
                )
                for i in range(depth - num_blocks, depth)
            }
        )  # fmt: skip
        self.norm = nn.LayerNorm(dims, options['norm_eps'])
        self.query = trunc_normal_parameter(1, num_queries, dims)
        self.classify = nn.Linear(dims, num_classes + 1)
        self.embed_mask = nn.Sequential(
            nn.Linear(dims, dims),
            nn.GELU(),
            nn.Linear(dims, dims),
            nn.GELU(),
            nn.Linear(dims, dims),
        )
        steps = max(1, round(math.log2(patch_size / MASK_STRIDE)))
        self.upscale = nn.Sequential(*(Upscale(dims) for _ in range(steps)))
        self.annealing = None if annealing is None else MaskAnnealing(num_blocks, **annealing)

    def init_fresh(self) -> None:
        """Initialize without checkpoints."""
        super().init_fresh()
        init_own(self)

    def forward(self, x: Tensor, prefix: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Classes and masks of the queries.

        Args:
            x: The map behind the block before, ``(B, C, H, W)``.
            prefix: Its class token and registers, ``(B, P, C)``; P may be 0.

        Returns:
            Logits of classes, ``(B, Q, num_classes + 1)``, and of masks, ``(B, Q, h, w)``: behind
            the last block, and, where there is annealing, in training also before every block.
        """
        grid, num_prefix = tuple(x.shape[-2:]), self.num_queries + prefix.shape[1]
        query = self.query.expand(len(x), -1, -1).to(x.dtype)
        tokens = torch.cat([query, prefix, x.flatten(2).transpose(1, 2)], dim=1)
        rotation = None
        if kind := self.arch.get('rotary'):
            dims = self.arch['embed_dims'] // self.arch['num_heads']
            rotation = grid_rotation(kind, grid, num_prefix, dims, x.device)
        masked = self.training and self.annealing is not None
        shares = self.annealing.advance() if masked else [0.0] * len(self.blocks)
        classes, masks = [], []
        for block, share in zip(self.blocks.values(), shares, strict=True):
            bias = None
            if masked:
                predicted = self.predict(tokens, grid, num_prefix)
                classes.append(predicted[0])
                masks.append(predicted[1])
                bias = self.mask_bias(predicted[1], grid, num_prefix, share)
            attn_fn = rotated(partial(full_attention, bias=bias), rotation)
            tokens = run_block(block, tokens, attn_fn, recompute=self.with_cp)
        predicted = self.predict(tokens, grid, num_prefix)
        return [*classes, predicted[0]], [*masks, predicted[1]]

    def predict(
        self, tokens: Tensor, grid: tuple[int, int], num_prefix: int
    ) -> tuple[Tensor, Tensor]:
        """Logits of classes and masks from the tokens before or behind a block."""
        tokens = self.norm(tokens)
        query = tokens[:, : self.num_queries]
        pixels = self.upscale(to_map(tokens[:, num_prefix:].unflatten(1, grid)))
        masks = torch.einsum('bqc,bchw->bqhw', self.embed_mask(query), pixels)
        return self.classify(query), masks

    def mask_bias(
        self, masks: Tensor, grid: tuple[int, int], num_prefix: int, share: float
    ) -> Tensor | None:
        """Hides tokens from each other in attention, ``(B, 1, N, N)``; None hides none.

        Args:
            masks: Predicted before the block, logits, ``(B, Q, h, w)``.
            grid: Of the tokens.
            num_prefix: Tokens before those of the grid.
            share: Of the queries that attend to the places of their mask alone.
        """
        if share <= 0:
            return None
        inside = F.interpolate(masks.detach(), grid, mode='bilinear').flatten(2) > 0  # (B, Q, HW)
        free = torch.rand(inside.shape[:2], device=masks.device) >= share
        count = num_prefix + inside.shape[-1]
        hidden = inside.new_zeros(len(inside), count, count)
        hidden[:, : self.num_queries, num_prefix:] = ~(inside | free[..., None])
        return masks.new_zeros(hidden.shape).masked_fill_(hidden, float('-inf'))[:, None]


class Upscale(nn.Sequential):
    """Twice the rows and columns of a map: ``(B, C, H, W) -> (B, C, 2 * H, 2 * W)``."""

    def __init__(self, dims: int) -> None:
        super().__init__(
            nn.ConvTranspose2d(dims, dims, 2, 2),
            nn.GELU(),
            nn.Conv2d(dims, dims, 3, padding=1, groups=dims, bias=False),
            LayerNorm2d(dims),
        )
