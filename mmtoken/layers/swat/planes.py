"""Tokens that keep the spatial structure of what they stand for.

A structure-aware token of C channels holds C / side**2 planes of side x side cells, in the order
(plane, row, column) of torch's ``pixel_unshuffle``. Unfolding the planes gives a finer grid of
tokens with smaller planes and, in the end, pixels.

Source: SWAT, arXiv 2111.13677, section 3.1.
"""

from torch import Tensor


def fold_planes(x: Tensor, side: int, scale: int) -> Tensor:
    """Put the planes of each ``scale`` x ``scale`` group of tokens together to one token's.

    Args:
        x: Tokens, ``(B, H, W, C)``; H and W are multiples of ``scale``.
        side: Side of their planes, in cells; 1 for pixels.
        scale: Side of the group, in tokens.

    Returns:
        ``(B, H / scale, W / scale, C * scale**2)``, tokens with planes of ``side * scale``.

    Inverse: :func:`unfold_planes`, of planes of ``side * scale``.
    """
    batch, height, width, _ = x.shape
    x = x.reshape(batch, height // scale, scale, width // scale, scale, -1, side, side)
    return x.permute(0, 1, 3, 5, 2, 6, 4, 7).reshape(batch, height // scale, width // scale, -1)


def unfold_planes(x: Tensor, side: int, scale: int) -> Tensor:
    """Cut the planes of each token into ``scale`` x ``scale`` parts, each a token of its own.

    Args:
        x: Tokens, ``(B, H, W, C)``.
        side: Side of their planes, in cells, a multiple of ``scale``.
        scale: Parts along a side.

    Returns:
        ``(B, H * scale, W * scale, C / scale**2)``, tokens with planes of ``side / scale``; pixels
        if ``scale`` is ``side``.

    Inverse: :func:`fold_planes`, of planes of ``side / scale``.
    """
    batch, height, width, _ = x.shape
    part = side // scale
    x = x.reshape(batch, height, width, -1, scale, part, scale, part)
    return x.permute(0, 1, 4, 2, 6, 3, 5, 7).reshape(batch, height * scale, width * scale, -1)
