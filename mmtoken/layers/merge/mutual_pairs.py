"""Mutual-pair merging: average tokens that are each other's nearest neighbor, and copy them back.

Reduction (:func:`merge_mutual_pairs`) averages each pair of tokens of an image that are each
other's nearest neighbor in cosine similarity, and notes which token stands for each place of the
grid. Restoration (:func:`unmerge`) copies each token to the places that it stands for: one gather,
however often tokens were merged. There is nothing to learn and no ratio to set: how many tokens
are left depends on the image.

Source: MPM, arXiv 2604.05718; written from its abstract and from what others say of it. Not
specified there and therefore our choice: averages are weighted by the number of patches that tokens
stand for; similarities are those of the tokens themselves, in fp32; prefix tokens (class token,
registers) never merge; of equally near neighbors the first counts.
"""

from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ...runtime.reference import is_compiling
from ..common.attention import gated_attention_fused, varlen_attention
from ..common.precision import full_precision
from ..common.regions import check_concrete, find_chosen
from ..common.rotary import Rotation, rotated
from ..common.vit import AttentionFn

# Similarities that are in memory at a time: 4 MB in fp32, all those of 1024 tokens
MAX_SIMILARITIES = 2**20


@dataclass(frozen=True)
class MergedLayout:
    """Which tokens a batch has, and what they stand for.

    Tokens are packed image after image, M in all; in an image the prefix tokens come first, then
    the others in the order of the first place that each stands for.

    Attributes:
        grid: ``(H, W)``, in patches.
        num_prefix_tokens: Prefix tokens of each image, P.
        lengths: Tokens of each image.
        owner: The token that stands for each place, prefix first, ``(B, P + H * W)``.
        sizes: Places that each token stands for, ``(M,)``, float.
        rotation: Of queries and keys, where positions are rotary.
    """

    grid: tuple[int, int]
    num_prefix_tokens: int
    lengths: list[int]
    owner: Tensor
    sizes: Tensor
    rotation: Rotation | None = None

    def attn_fn(self, proportional: bool) -> AttentionFn:
        """Attention between the tokens of an image, ``(M, heads, d)`` each.

        Args:
            proportional: A key that stands for n places counts n times.
        """
        attn_fn = partial(varlen_attention, lengths=self.lengths)
        if proportional:
            attn_fn = partial(gated_attention_fused, gate=self.sizes, lengths=self.lengths)
        return rotated(attn_fn, self.rotation)


def unmerged_layout(
    grid: tuple[int, int],
    num_prefix_tokens: int,
    batch: int,
    device: torch.device,
    rotation: Rotation | None = None,
) -> MergedLayout:
    """The layout before the first merge: each place has its own token.

    Args:
        grid: ``(H, W)``, in patches.
        num_prefix_tokens: P.
        batch: Images.
        device: For tensors.
        rotation: Of the tokens of an image, where positions are rotary.
    """
    length = num_prefix_tokens + grid[0] * grid[1]
    owner = torch.arange(batch * length, device=device)
    sizes = torch.ones(batch * length, device=device)
    if rotation is not None:
        rotation = rotation.like(rotation.cos_sin.repeat(batch, 1))
    owner = owner.view(batch, -1)
    return MergedLayout(grid, num_prefix_tokens, [length] * batch, owner, sizes, rotation)


# Not traced: the number of tokens depends on values.
@torch.compiler.disable
def merge_mutual_pairs(
    tokens: Tensor, layout: MergedLayout, least: int = 0
) -> tuple[Tensor, MergedLayout]:
    """Average all mutual pairs of each image. Synchronizes with the device once.

    Args:
        tokens: ``(M, C)``.
        layout: Theirs.
        least: Tokens of each image, without its prefix, that are left at least: the pairs that are
            most alike merge first.

    Returns:
        Fewer tokens, ``(M', C)``, and their layout.

    Raises:
        RuntimeError: ``torch.jit.trace`` is recording, or see
            :func:`~mmtoken.layers.common.regions.check_concrete`.

    Inverse, up to the averages: :func:`unmerge`.
    """
    if torch.jit.is_tracing():
        raise RuntimeError(
            'this network merges tokens that are alike, and torch.jit.trace would keep the pairs '
            'that it finds in one image. mmtoken.dense_twin(cfg) merges nothing and can be traced'
        )
    check_concrete(tokens, len(layout.lengths))
    prefix, start, others = layout.num_prefix_tokens, 0, []
    for image in tokens.detach().split(layout.lengths):
        rest = image.narrow(0, prefix, image.shape[0] - prefix)  # whose size torch.export knows
        alone = torch.arange(prefix, device=tokens.device)
        others.append(torch.cat([alone, find_mutual_pairs(rest, least) + prefix]) + start)
        start += image.shape[0]
    other = torch.cat(others)  # in the pair of each token; itself, if it has none
    place = torch.arange(other.shape[0], device=other.device)
    stays = place <= other  # the first of a pair stands for both
    rank = stays.cumsum(0) - 1
    counts = torch.stack([part.sum() for part in stays.split(layout.lengths)])
    first, counts = find_chosen(stays, rank, counts[:, None])
    second = other[first]
    size, added = layout.sizes[first], layout.sizes[second]
    share = (added / (size + added))[:, None]

    def merge(values: Tensor) -> Tensor:
        pair = values.index_select(0, first), values.index_select(0, second)
        return torch.lerp(*pair, share.to(values.dtype))

    rotation = layout.rotation
    if rotation is not None:
        rotation = rotation.like(merge(rotation.cos_sin))
    owner = rank[torch.minimum(place, other)][layout.owner]
    sizes = size + added * (first != second)
    lengths = [count for (count,) in counts]
    layout = replace(layout, lengths=lengths, owner=owner, sizes=sizes, rotation=rotation)
    return merge(tokens), layout


def unmerge(tokens: Tensor, layout: MergedLayout) -> Tensor:
    """Copy tokens to all places that they stand for: ``(M, C) -> (B, P + H * W, C)``."""
    return tokens.index_select(0, layout.owner.flatten()).unflatten(0, tuple(layout.owner.shape))


def find_mutual_pairs(x: Tensor, least: int = 0) -> Tensor:
    """Pairs of vectors that are each other's nearest neighbor.

    Args:
        x: ``(N, C)``.
        least: Only the ``N - least`` pairs that are most alike count.

    Returns:
        For each vector the index of the other in its pair, its own if it is in none: ``(N,)``.
    """
    nearest, similarity = nearest_neighbors(x)
    place = torch.arange(x.shape[0], device=x.device)
    other = torch.where(nearest[nearest] == place, nearest, place)
    if not least:
        return other
    first = place < other
    order = similarity.masked_fill(~first, float('-inf')).argsort(descending=True, stable=True)
    merges = torch.zeros_like(first)
    merges[order[: torch.sym_max(0, x.shape[0] - least)]] = True
    merges &= first
    return torch.where(merges | merges[other], other, place)


def nearest_neighbors(x: Tensor) -> tuple[Tensor, Tensor]:
    """The most similar other vector, by cosine; of several the first.

    Args:
        x: ``(N, C)``.

    Returns:
        Its index, ``(N,)``, of a single vector its own; and the similarity, ``(N,)``.
    """
    with full_precision(x.device):
        x = F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=1)
        # In torch.export, where N is not known, there is one part.
        parts = [x] if is_compiling() else x.split(max(1, MAX_SIMILARITIES // len(x)))
        found, start = [], 0
        for part in parts:
            similarity = part @ x.T  # (rows, N)
            row = torch.arange(part.shape[0], device=x.device)
            similarity[row, row + start] = float('-inf')
            found.append(similarity.max(dim=1))
            start += part.shape[0]
    return torch.cat([f.indices for f in found]), torch.cat([f.values for f in found])
