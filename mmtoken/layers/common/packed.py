"""A batch of token sequences, packed: what a backbone hands to a neck that restores maps."""

from typing import NamedTuple

import torch
from torch import Tensor


class SparseFeatures(NamedTuple):
    """The tokens of one tap.

    What the tokens of an image are, and in which order, is the method's: a backbone and its neck
    agree on it. A NamedTuple, so that wrappers which move or cast tensors find them.

    Attributes:
        tokens: ``(M, C)``, image after image, without padding.
        lengths: Tokens of each image, ``(B,)``, adding up to M; on the device of the tokens.
        layout: Where on the grid the tokens belong, as far as it differs between images; None if
            the grid says it all.
        grid: ``(H, W)`` of the dense map, in its tokens.
    """

    tokens: Tensor
    lengths: Tensor
    layout: Tensor | None
    grid: tuple[int, int]


def pack_equal(sequences: Tensor, grid: tuple[int, int]) -> SparseFeatures:
    """Pack sequences of one length.

    Args:
        sequences: ``(B, L, C)``.
        grid: ``(H, W)`` of the dense map.

    Inverse: :func:`unpack_equal`.
    """
    batch, length = sequences.shape[:2]
    lengths = torch.full((batch,), length, device=sequences.device)
    return SparseFeatures(sequences.flatten(0, 1), lengths, None, grid)


def unpack_equal(features: SparseFeatures) -> Tensor:
    """Sequences of one length, ``(B, L, C)``. Does not wait for the device.

    Raises:
        ValueError: The tokens cannot be shared out equally.
    """
    batch, total = len(features.lengths), len(features.tokens)
    if total % batch:
        raise ValueError(f'{total} tokens are no multiple of {batch} images')
    return features.tokens.unflatten(0, (batch, total // batch))
