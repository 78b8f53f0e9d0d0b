"""Swin blocks, a few windows at a time."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from timm.layers import Mlp
from torch import Tensor

from ..layers.common.cache import cache_by_shape
from ..layers.common.swin import SwinBlock
from ..layers.common.windows import shift_mask, window_index
from .tiling import tiled, tokens_per_tile, use_tiling

Projection = Callable[[Tensor], Tensor]


@tiled
class TiledSwinBlock(SwinBlock):
    """:class:`~mmtoken.layers.common.swin.SwinBlock` for CPU inference."""

    def forward(self, x: Tensor) -> Tensor:
        # Another MLP may mix tokens
        if type(self.mlp) is not Mlp or not use_tiling(self, x):
            return super().forward(x)
        return attend_in_tiles(self, x, self.attn.qkv, self.attn.proj, self.add_mlp)

    def add_mlp(self, x: Tensor) -> Tensor:
        """The second half of the block: ``(n, C) -> (n, C)``, in place."""
        x += self.mlp(self.norm2(x))
        return x


def attend_in_tiles(
    block: SwinBlock,
    x: Tensor,
    qkv: Projection,
    proj: Projection,
    then: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The first half of a Swin block, ``x + attend(norm1(x))``, a few windows at a time.

    Args:
        block: The block; its layers treat each token alone, but for attention.
        x: ``(B, H, W, C)``.
        qkv: Called in place of ``block.attn.qkv``, ``(n, C) -> (n, 3 * C)``.
        proj: Called in place of ``block.attn.proj``, ``(n, C) -> (n, C)``.
        then: What else to do to the tokens of each tile, ``(n, C) -> (n, C)``.

    Returns:
        ``(B, H, W, C)``.
    """
    attn, size = block.attn, block.window_size
    batch, *grid, channels = x.shape
    tokens = x.reshape(-1, channels)
    out = torch.empty_like(tokens)
    padding = qkv(tokens.new_zeros(1, channels))  # padding is added behind the norm
    bias = attn.position_bias()
    length = tokens_per_tile(channels)
    for tile in plan_tiles(batch, tuple(grid), size, block.shift_on(grid), length):
        t = tokens.index_select(0, tile.tokens)  # (n, C)
        windows = tile.to_windows(qkv(block.norm1(t)), padding)  # (windows * L, 3 * C)
        mask = bias if tile.mask is None else bias.masked_fill(tile.mask, float('-inf'))
        attended = attn.attend(windows.unflatten(0, (-1, size**2)), mask).flatten(0, 1)
        t += proj(tile.to_tokens(attended))
        out.index_copy_(0, tile.tokens, t if then is None else then(t))
    return out.view_as(x)


class WindowTile(NamedTuple):
    """Some windows of L tokens, and the n tokens in them that are not padding.

    Attributes:
        tokens: ``(n,)``, indices into the ``B * H * W`` tokens of the batch.
        slot_index: ``(windows * L,)``, which of the n tokens is in each place of the windows, n for
            padding; None if there is no padding, and the tokens are in the order of the windows.
        inverse_index: ``(n,)``, the place of each token; None likewise.
        mask: ``(windows, 1, L, L)``, True between tokens that must not attend to each other; None
            if all may.
    """

    tokens: Tensor
    slot_index: Tensor | None
    inverse_index: Tensor | None
    mask: Tensor | None

    def to_windows(self, x: Tensor, padding: Tensor) -> Tensor:
        """``(n, C)`` and the padding ``(1, C)`` to ``(windows * L, C)``. Inverse: to_tokens."""
        if self.slot_index is None:
            return x
        return torch.cat([x, padding.to(x.dtype)]).index_select(0, self.slot_index)

    def to_tokens(self, windows: Tensor) -> Tensor:
        """``(windows * L, C)`` to ``(n, C)``, without padding."""
        return windows if self.slot_index is None else windows.index_select(0, self.inverse_index)


@cache_by_shape
def plan_tiles(
    batch: int, grid: tuple[int, int], size: int, shift: int, length: int
) -> tuple[WindowTile, ...]:
    """Divide the windows of a batch into tiles of at most ``length`` tokens, or one window.

    Windows without padding and mask come first, so that most tiles have neither.

    Args:
        batch: Images.
        grid: ``(H, W)``, in tokens; padded at the bottom and right to whole windows.
        size: Window side, in tokens.
        shift: Cyclic shift of the padded grid, in tokens.
        length: From :func:`~mmtoken.fast.tiling.tokens_per_tile`.
    """
    num_tokens = grid[0] * grid[1]
    index = window_index(grid, size, shift)  # (windows, L)
    inner = (index < num_tokens).all(dim=1)
    shifted = shift_mask(grid, size, shift) if shift else None
    if shifted is not None:
        inner &= shifted.window == 0
    tiles = []
    for windows in (inner.nonzero().flatten(), (~inner).nonzero().flatten()):
        image = torch.arange(batch).repeat_interleave(len(windows))
        windows = windows.repeat(batch)
        for i, w in _chunks(image, windows, step=max(1, length // size**2)):
            mask = None if shifted is None else shifted.patterns[shifted.window[w]]
            tiles.append(_tile(index[w], i, num_tokens, mask))
    return tuple(tiles)


def _chunks(*tensors: Tensor, step: int) -> Iterable[tuple[Tensor, ...]]:
    return zip(*(t.split(step) for t in tensors), strict=True) if len(tensors[0]) else ()


def _tile(index: Tensor, image: Tensor, num_tokens: int, mask: Tensor | None) -> WindowTile:
    real = (index < num_tokens).flatten()
    tokens = (index + num_tokens * image[:, None]).flatten()[real]
    slot_index = inverse_index = None
    if not real.all():
        inverse_index = real.nonzero().flatten()
        slot_index = torch.full(real.shape, len(tokens))
        slot_index[inverse_index] = torch.arange(len(tokens))
    if mask is not None and not mask.any():
        mask = None
    return WindowTile(tokens, slot_index, inverse_index, mask)
