"""A loss that holds the cost of a network to a budget, and what a network of DGE costs.

Source: Dynamic Grained Encoder, arXiv 2301.03831, budget loss; released code StevenGrove/vtpack
(Apache-2.0), whose formulas of complexity these are. They do not count multiply-accumulates; the
target of the budget is a fraction of them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from mmengine.dist import all_reduce, get_world_size
from torch import Tensor

from ..arguments import is_number
from ..layers.common.regions import RegionLayout
from ..layers.dge.block import DynamicGranularityBlock
from ..layers.dge.stage import Decisions
from ..registry import MODELS, build_loss
from ..runtime.aux_losses import publish, should_publish
from .warm_up import WarmUpLoss

# The budget of backbones and necks by default, as in the released code.
BUDGET = dict(type='mmtoken.BudgetLoss', target=0.5, loss_weight=1.0)


@MODELS.register_module()
class BudgetLoss(WarmUpLoss):
    """``loss_weight * (beta - target)**2``, where beta is the share of the full cost that is used.

    Beta is the cost of the routed network over that of the full one, each summed over the images of
    all GPUs; the release sums over those of one GPU. The penalty is soft: the released models with
    a target of 0.5 reach 0.57 and 0.65.

    Args:
        target: The share to aim for, above 0 and at most 1.
        loss_weight: Factor of the loss.
        warmup_iters: Number of training passes over which the factor rises from 0 to
            ``loss_weight``. They are counted in the buffer ``iterations``, which checkpoints keep.
        legacy: Whether to count the constant part of the cost as the release does, which takes
            channels times height for the pixels of an image. For comparison with its figures.
        num_classes: Classes of a classifier whose cost is counted too; 0 for none.

    Raises:
        ValueError: An argument outside its range.

    Example:
        >>> full, routed = torch.tensor([100.0, 100.0]), torch.tensor([60.0, 80.0])
        >>> loss, beta = BudgetLoss(target=0.5)(full, routed)
        >>> round(beta.item(), 4), round(loss.item(), 4)
        (0.7, 0.04)
    """

    def __init__(
        self,
        target: float = 0.5,
        loss_weight: float = 1.0,
        warmup_iters: int = 0,
        legacy: bool = False,
        num_classes: int = 0,
    ) -> None:
        super().__init__(loss_weight, warmup_iters)
        if not is_number(target) or not 0 < target <= 1:
            raise ValueError(f'target must be above 0 and at most 1, got {target!r}')
        if not num_classes >= 0:
            raise ValueError(f'num_classes must be 0 or more, got {num_classes}')
        self.target = target
        self.legacy = legacy
        self.num_classes = num_classes

    def forward(self, static: Tensor, dynamic: Tensor) -> tuple[Tensor, Tensor]:
        """Compare the cost of images with the budget.

        In distributed training all processes must call it, each with its own images.

        Args:
            static: Cost of each image in the full network, float32 or float64, ``(B,)``.
            dynamic: Cost of each image as routed, likewise; gradients flow through it.

        Returns:
            The loss, float32, ``()``, and beta without its graph, of the inputs' type, ``()``.

        Raises:
            ValueError: Unequal shapes.
        """
        if static.shape != dynamic.shape:
            raise ValueError(
                'static and dynamic must have one value for each image, got shapes '
                f'{tuple(static.shape)} and {tuple(dynamic.shape)}'
            )
        static, dynamic = static.detach().sum(), dynamic.sum()
        sums = torch.stack([static, dynamic.detach()])
        all_reduce(sums)
        full, used = sums[0].clamp(min=1), sums[1]
        # The value covers the images of all processes. The gradient comes from the local images
        # only, multiplied by the number of processes, since DDP averages over them.
        share = get_world_size() * dynamic / full
        beta = used / full + (share - share.detach())
        loss = self._weight() * (beta - self.target) ** 2
        return loss.float(), beta.detach()


class BlockWidths(NamedTuple):
    """What the cost of a block depends on besides its tokens and queries.

    Attributes:
        embed_dims, feedforward_channels, num_heads: As usual.
        region_size: Side of a region, in tokens.
        num_granularities: K.
        sr_ratio: Side of the patch that becomes one key, in tokens.
        num_points: Positions per head of deformable attention; 0 for any other attention.
        attn_products: Products of attention that are counted, with keys and with values: one in the
            released PVT, two in the released DeiT.
    """

    embed_dims: int
    feedforward_channels: int
    num_heads: int
    region_size: int = 4
    num_granularities: int = 3
    sr_ratio: int = 1
    num_points: int = 0
    attn_products: int = 1

    @classmethod
    def of(cls, block: DynamicGranularityBlock, attn_products: int = 1) -> 'BlockWidths':
        """The widths of a new block."""
        attn = block.attn
        return cls(
            block.embed_dims, block.feedforward_channels, attn.num_heads, block.region_size,
            len(block.granularities), getattr(attn, 'sr_ratio', 1), getattr(attn, 'num_points', 0),
            attn_products,
        )  # fmt: skip


class PatchWidths(NamedTuple):
    """What the cost of a patch embedding depends on besides the size of the image.

    Attributes:
        in_channels, embed_dims: Channels of its input and output.
        patch_size: Side of a patch, in pixels or in places of the input.
        has_norm: Whether it has a LayerNorm.
    """

    in_channels: int
    embed_dims: int
    patch_size: int
    has_norm: bool


def block_complexity(widths: BlockWidths, tokens: Tensor, queries: Tensor) -> Tensor:
    """Complexity of a block with given numbers of tokens and queries, ``(B,)`` each."""
    dims, hidden = widths.embed_dims, widths.feedforward_channels
    attention = deformable_complexity if widths.num_points else spatial_reduction_complexity
    total = 2 * tokens * dims + 2 * queries * dims * hidden + queries * hidden
    router = tokens / widths.region_size**2 * dims * (1 + widths.num_granularities)
    return total + attention(widths, tokens, queries) + router


def spatial_reduction_complexity(widths: BlockWidths, tokens: Tensor, queries: Tensor) -> Tensor:
    """That of attention to all tokens, or to fewer that a convolution makes of them."""
    dims, keys = widths.embed_dims, tokens / widths.sr_ratio**2
    reduction = tokens * dims**2 + keys * dims if widths.sr_ratio > 1 else 0
    products = queries * keys * (widths.attn_products * dims + 3 * widths.num_heads)
    return reduction + 2 * keys * dims**2 + 2 * queries * dims**2 + products


def deformable_complexity(widths: BlockWidths, tokens: Tensor, queries: Tensor) -> Tensor:
    """That of deformable attention.

    The release has no deformable attention with dynamic granularity. This counts the Linear layers
    and, for each sampled value, the four tokens it is interpolated from and its weight.
    """
    dims, positions = widths.embed_dims, widths.num_heads * widths.num_points
    sampling = queries * dims * widths.num_points * 5
    return tokens * dims**2 + queries * (dims**2 + 3 * dims * positions) + sampling


def constant_complexity(
    budget: BudgetLoss, patch_embeds: Sequence[PatchWidths], valid: Tensor
) -> Tensor:
    """Complexity that does not depend on choices: patch embeddings, and a classifier if any.

    Args:
        budget: Says how pixels are counted, and the number of classes.
        patch_embeds: In their order; each takes the map of the previous one.
        valid: Sizes of the images, ``(B, 2)``, in pixels, of the type of the result.

    Returns:
        ``(B,)``.
    """
    pixels = patch_embeds[0].in_channels * valid[:, 0] if budget.legacy else valid.prod(dim=1)
    total = torch.full_like(pixels, patch_embeds[-1].embed_dims * budget.num_classes)
    for in_channels, dims, patch_size, has_norm in patch_embeds:
        total = total + pixels * in_channels * dims
        pixels = pixels / patch_size**2
        total = total + pixels * dims * has_norm
    return total


def count_tokens(
    gates: Tensor, layout: RegionLayout, padding: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Tokens and queries of each image, without padding.

    Args:
        gates: One-hot choices, ``(B, Hr, Wr, K)``. Counts have their type, float32 in training,
            since some devices have no float64: exact to seven digits. For integers it is float64.
        layout: Of the regions.
        padding: Regions that are padding, ``(B, Hr, Wr)``, or None.

    Returns:
        Both ``(B,)``; that of queries has the gradient of the gates.
    """
    gates = gates if gates.is_floating_point() else gates.double()
    counts = layout.num_cells.to(gates.dtype)
    valid_mask = gates.new_ones(len(gates), len(counts))
    if padding is not None:
        valid_mask = (~padding).flatten(1).to(gates.dtype)
    tokens = layout.num_prefix_tokens + (valid_mask * counts[:, 0]).sum(dim=1)
    cells = (gates.flatten(1, 2) * counts).sum(dim=-1)
    return tokens, layout.num_prefix_tokens + (valid_mask * cells).sum(dim=1)


def build_budget(budget: dict | None, granularities: Sequence[int]) -> BudgetLoss | None:
    """Build the loss of a network with these granularities; None if it has no choice."""
    if budget is None or len(granularities) == 1:
        return None
    return build_loss(budget, 'budget', 'mmtoken.BudgetLoss')


def publish_budget(
    budget: BudgetLoss | None,
    stages: Sequence[tuple[BlockWidths, Decisions]],
    patch_embeds: Sequence[PatchWidths] = (),
    valid: Tensor | None = None,
    prefix: str = '',
) -> None:
    """In training, publish the budget loss of a network and its ratios of queries to tokens.

    Args:
        budget: The loss of the network; None publishes nothing.
        stages: Widths of the blocks of each stage, and what these chose.
        patch_embeds: Patch embeddings whose cost is counted too.
        valid: Sizes of the images, ``(B, 2)``, in pixels, from
            :func:`~mmtoken.layers.common.padding.valid_size`; needed with ``patch_embeds``.
        prefix: In front of the published names.

    Raises:
        RuntimeError: Nobody collects losses.
    """
    if budget is None or not should_publish(budget.training):
        return
    counts = [
        [count_tokens(gates, decisions.layout, decisions.padding) for gates in decisions.gates]
        for _, decisions in stages
    ]
    blocks = [(w, *n) for (w, _), numbers in zip(stages, counts, strict=True) for n in numbers]
    static = sum(block_complexity(widths, tokens, tokens) for widths, tokens, _ in blocks)
    dynamic = sum(block_complexity(widths, tokens, queries) for widths, tokens, queries in blocks)
    if patch_embeds:
        constant = constant_complexity(budget, patch_embeds, valid.to(static.dtype))
        static, dynamic = constant + static, constant + dynamic
    loss, ratio = budget(static, dynamic)
    values = {f'{prefix}loss_budget': loss, f'{prefix}budget_ratio': ratio}
    for i, numbers in enumerate(counts):
        tokens, queries = (sum(n.sum() for n in column) for column in zip(*numbers, strict=True))
        values[f'{prefix}query_ratio_s{i}'] = (queries / tokens.clamp(min=1)).detach()
    publish(values)
