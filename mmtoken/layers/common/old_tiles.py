"""Work tile by tile: large maps are taken through a whole block a few windows at a time.

What stands between two tokens of a block (projections, the hidden layer of the MLP) is several
times larger than the tokens. For a whole map it is written to memory that the system must first
hand out and later fetch back into the cache; for a tile it never leaves the cache. On a CPU that
halves the time of an early Swin block. Training keeps those tensors for backward anyway, and a GPU
would rather have few large kernels, so both take whole maps. So do blocks in which somebody has
replaced or watches a layer (:mod:`~mmtoken.layers.common.plain`), which is to see whole maps too.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from ...runtime.reference import on_reference_path
from .cache import cache_by_shape
from .plain import all_plain
from .windows import shift_mask, window_index

# The hidden layer of an MLP is then 3 MB in fp32.
TILE_ELEMENTS = 192_000


def tokens_per_tile(channels: int) -> int:
    """Tokens in a tile: 2000 of 96 channels, 500 of 384."""
    return max(1, TILE_ELEMENTS // channels)


def use_tiling(x: Tensor, training: bool, *layers: nn.Module) -> bool:
    """Whether ``x`` is to be computed on tile by tile.

    Args:
        x: Any tensor of the map.
        training: Whether the computation has random parts, or parts that depend on the batch.
        layers: All layers that take part, which must be plain.
    """
    inference = not training and not torch.is_grad_enabled()
    on_cpu = inference and x.device.type == 'cpu' and not on_reference_path()
    return on_cpu and all_plain(*layers)


def chunked_apply(
    function: Callable[..., Tensor], *tensors: Tensor, training: bool, layers: Iterable[nn.Module]
) -> Tensor:
    """Apply a function that treats every token by itself, in inference tile by tile.

    Args:
        function: ``(n, C), ... -> (n, C')``.
        tensors: ``(..., C)``, alike but for their channels.
        training: As for :func:`use_tiling`.
        layers: Likewise: those that ``function`` calls.

    Returns:
        ``(..., C')``.
    """
    length = tokens_per_tile(max(t.shape[-1] for t in tensors))
    small = tensors[0].shape[:-1].numel() <= length
    if small or not use_tiling(tensors[0], training, *layers):
        return function(*tensors)
    tiles = zip(*(t.reshape(-1, t.shape[-1]).split(length) for t in tensors), strict=True)
    out, start = None, 0
    for tile in tiles:
        result = function(*tile)
        if out is None:
            out = result.new_empty(tensors[0].shape[:-1].numel(), result.shape[-1])
        out[start : start + len(result)] = result
        start += len(result)
    return out.view(*tensors[0].shape[:-1], -1)


class WindowTile(NamedTuple):
    """Some windows of a batch of token grids, and the tokens in them.

    Attributes:
        tokens: ``(n,)``, their tokens, as indices into the ``B * H * W`` of the batch.
        slots: ``(windows * L,)``, which of the ``n`` tokens stands in each place of the windows,
            ``n`` for padding; None if the tokens are those of whole windows, in order.
        places: ``(n,)``, the inverse of ``slots``; None likewise.
        apart: ``(windows, 1, L, L)``, True between tokens that must not attend to each other; None
            if there are none.
    """

    tokens: Tensor
    slots: Tensor | None
    places: Tensor | None
    apart: Tensor | None

    def to_windows(self, x: Tensor, padding: Tensor) -> Tensor:
        """``(n, C)`` and the padding ``(C,)`` to ``(windows * L, C)``. Inverse: to_tokens."""
        if self.slots is None:
            return x
        return torch.cat([x, padding[None].to(x.dtype)]).index_select(0, self.slots)

    def to_tokens(self, windows: Tensor) -> Tensor:
        """``(windows * L, C)`` to ``(n, C)``, leaving the padding out."""
        return windows if self.places is None else windows.index_select(0, self.places)


@cache_by_shape
def plan_window_tiles(
    batch: int, grid: tuple[int, int], size: int, shift: int, length: int
) -> tuple[WindowTile, ...]:
    """Deal the windows of a batch out into tiles of at most ``length`` tokens, or one window.

    Inner windows come first and those that touch the border last, so that most tiles know neither
    padding nor mask.

    Args:
        batch: Images.
        grid: ``(H, W)``, in tokens; padded at the bottom and right to whole windows.
        size: Window side, in tokens.
        shift: Cyclic shift of the padded grid, in tokens.
        length: From :func:`tokens_per_tile`.
    """
    num_tokens = grid[0] * grid[1]
    index = window_index(grid, size, shift)
    whole = (index < num_tokens).all(dim=1)
    apart = shift_mask(grid, size, shift) if shift else None
    inner = whole if apart is None else whole & (apart.window == 0)
    tiles = []
    for windows in (inner.nonzero().flatten(), (~inner).nonzero().flatten()):
        image = torch.arange(batch).repeat_interleave(len(windows))
        windows = windows.repeat(batch)
        for i, w in _chunks(image, windows, step=max(1, length // size**2)):
            hidden = None if apart is None else apart.patterns[apart.window[w]]
            tiles.append(_tile(index[w], i, num_tokens, hidden))
    return tuple(tiles)


def _chunks(*tensors: Tensor, step: int) -> Iterable[tuple[Tensor, ...]]:
    return zip(*(t.split(step) for t in tensors), strict=True) if len(tensors[0]) else ()


def _tile(index: Tensor, image: Tensor, num_tokens: int, apart: Tensor | None) -> WindowTile:
    real = (index < num_tokens).flatten()
    tokens = (index + num_tokens * image[:, None]).flatten()[real]
    slots = places = None
    if not real.all():
        places = real.nonzero().flatten()
        slots = torch.full(real.shape, len(tokens))
        slots[places] = torch.arange(len(tokens))
    if apart is not None and not apart.any():
        apart = None
    return WindowTile(tokens, slots, places, apart)
