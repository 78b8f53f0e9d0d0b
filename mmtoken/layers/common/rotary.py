"""Rotary positions: queries and keys are turned by angles that are linear in their position.

Prefix tokens, which have no position, have angles of 0 and are not turned. A token that stands for
several patches, such as a coarse or merged one, is turned by the mean of their rotations, so that
a logit is the mean of those of the patches. Turned to their mean position, merged tokens of a
network with real features were three times as far from the features of all tokens
(``benchmarks/rotary``).

Source: RoFormer, arXiv 2104.09864; over rows and columns as in EVA-02, arXiv 2303.11331, and
DINOv3, arXiv 2508.10104.
"""

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .cache import cache_by_shape
from .vit import AttentionFn


class Rotary(NamedTuple):
    """How positions become angles.

    Attributes:
        temperature: The wavelength of the last frequency over that of the first.
        reference: Rows and columns that any grid is scaled to, where a step from one to the next
            is one radian of the first frequency. None scales rows and columns to one turn to
            either side of the center.
        interleaved: Channels 0 and 1 are turned by the first angle, 2 and 3 by the second, and so
            on; otherwise channels 0 and d / 2 by the first.
    """

    temperature: float
    reference: tuple[int, int] | None
    interleaved: bool


ROTARY = dict(
    dinov3=Rotary(100.0, reference=None, interleaved=False),
    eva02=Rotary(10000.0, reference=(16, 16), interleaved=True),
)


class Rotation(NamedTuple):
    """What queries and keys of tokens are turned by.

    Attributes:
        cos_sin: Cosines of all angles, then their sines, ``(N, d)``, or means of several tokens'.
        cos: Of each channel, ``(N, 1, d)``.
        sin: Likewise.
        interleaved: See :class:`Rotary`.
    """

    cos_sin: Tensor
    cos: Tensor
    sin: Tensor
    interleaved: bool

    @classmethod
    def by(cls, cos_sin: Tensor, interleaved: bool) -> 'Rotation':
        """The rotation by cosines and sines ``(N, d)``."""
        parts = cos_sin[:, None].chunk(2, dim=-1)
        if interleaved:
            cos, sin = (part.repeat_interleave(2, dim=-1) for part in parts)
        else:
            cos, sin = (torch.cat([part, part], dim=-1) for part in parts)
        return cls(cos_sin, cos, sin, interleaved)

    def like(self, cos_sin: Tensor) -> 'Rotation':
        """A rotation of the same kind by other values, such as means or a selection of these."""
        return Rotation.by(cos_sin, self.interleaved)

    def of(self, tokens: Tensor | slice) -> 'Rotation':
        """That of some tokens alone, given their indices ``(M,)``."""
        return Rotation(*(part[tokens] for part in self[:3]), self.interleaved)

    def then(self, other: 'Rotation') -> 'Rotation':
        """That of these tokens and, behind them, of others."""
        parts = zip(self[:3], other[:3], strict=True)
        return Rotation(*(torch.cat(pair) for pair in parts), self.interleaved)


@cache_by_shape
def grid_rotation(
    kind: str, grid: tuple[int, int], num_prefix_tokens: int, dims: int, device: torch.device
) -> Rotation:
    """The rotation of the tokens of a grid, row by row, prefix tokens first.

    Args:
        kind: A key of :data:`ROTARY`.
        grid: ``(H, W)``.
        num_prefix_tokens: Tokens that are not turned.
        dims: Of an attention head, a multiple of 4.
        device: For the result, which is float32.
    """
    angles = grid_angles(kind, grid, dims)
    angles = torch.cat([angles.new_zeros(num_prefix_tokens, dims // 2), angles])
    cos_sin = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return Rotation.by(cos_sin.to(device), ROTARY[kind].interleaved)


def grid_angles(kind: str, grid: tuple[int, int], dims: int) -> Tensor:
    """The angles of the tokens of a grid, row by row: ``(H * W, dims / 2)``, float32."""
    rotary = ROTARY[kind]
    frequencies = rotary.temperature ** -torch.arange(0, 1, 4 / dims, dtype=torch.float64)
    axes = []
    for i, side in enumerate(grid):
        place = torch.arange(side, dtype=torch.float64)
        if rotary.reference is None:
            axes.append(2 * math.pi * (2 * (place + 0.5) / side - 1))
        else:
            axes.append(place * rotary.reference[i] / side)
    places = torch.stack(torch.meshgrid(*axes, indexing='ij'), dim=-1)  # (H, W, 2)
    return (places[..., None] * frequencies).reshape(-1, dims // 2).float()


def check_rotary(kind: str | None, embed_dims: int, num_heads: int, name: str = 'rotary') -> None:
    """Refuse what cannot be turned.

    Args:
        kind: A key of :data:`ROTARY`, or None.
        embed_dims: Channels of a token.
        num_heads: Attention heads.
        name: Of the argument, for messages.

    Raises:
        ValueError: An unknown kind, or channels of a head that are no multiple of 4.
    """
    if kind not in (None, *ROTARY):
        raise ValueError(f'{name} must be one of {(None, *ROTARY)}, got {kind!r}')
    if kind and embed_dims // num_heads % 4:
        raise ValueError(
            'rotary positions need a multiple of 4 channels in each head, got '
            f'{embed_dims} channels in {num_heads} heads'
        )


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn queries or keys ``(..., N, heads, d)``, in float32 at least."""
    if rotation.interleaved:
        turned = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    else:
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
    return (x * rotation.cos + turned * rotation.sin).to(x.dtype)


def rotated(
    attn_fn: AttentionFn, rotation: Rotation | None, keys: Rotation | None = None
) -> AttentionFn:
    """Attention whose queries and keys are turned before.

    Args:
        attn_fn: Attention of queries, keys and values.
        rotation: Of queries, and of keys if they are the same tokens; None turns nothing.
        keys: Of the keys of cross-attention.
    """
    if rotation is None:
        return attn_fn
    keys = rotation if keys is None else keys
    return partial(_attend, attn_fn=attn_fn, rotation=rotation, keys=keys)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_fn: AttentionFn,
    rotation: Rotation,
    keys: Rotation,
) -> Tensor:
    return attn_fn(rotate(query, rotation), rotate(key, keys), value)
