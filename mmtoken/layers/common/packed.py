"""Packed token sequences, which a backbone hands to a neck that restores maps."""

from typing import NamedTuple

import torch
from torch import Tensor


class SparseFeatures(NamedTuple):
    """The tokens behind one block.

    The order of the tokens is up to the method: a backbone and its neck agree on it. This is a
    NamedTuple, so that wrappers which move or cast tensors (FSDP, AMP) find them.

    Attributes:
        tokens: ``(M, C)``, image after image, without padding.
        lengths: Tokens of each image, ``(B,)``, adding up to M; on the device of the tokens.
        layout: Where on the grid the tokens belong, if that differs between images; otherwise None.
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
        ValueError: The number of tokens is no multiple of the number of images.
    """
    batch, total = len(features.lengths), len(features.tokens)
    if total % batch:
        raise ValueError(f'{total} tokens are no multiple of {batch} images')
    return features.tokens.unflatten(0, (batch, total // batch))
