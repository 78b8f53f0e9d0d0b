"""One attention map for several layers.

Source: PSViT, arXiv 2108.03428. A layer that shares computes ``A v`` of its own values with the map
``A = softmax(q k^T / sqrt(d))`` of another. Either that map is kept, or the queries and keys it is
made of are, and a fused kernel makes it again, which is the same arithmetic.
"""

import threading
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ...runtime.reference import on_reference_path
from ..common.attention import attention
from ..common.cache import runs_eagerly

Sharing = Literal['auto', 'map', 'query_key']

# Above, kept maps fill much memory. In training, where each is fresh memory and has a gradient as
# large, they are also slower than to make them again (measured with 6 heads of 64 channels).
KEEP_MAP_TOKENS = 1600
KEEP_MAP_TOKENS_IN_TRAINING = 512
KEPT_BUFFER_BYTES = 128 * 2**20
TILE_ROWS = 512
TILE_ELEMENTS = 2**18  # 1 MB of scores in fp32

_kept = threading.local()


class SharedMap(NamedTuple):
    """A map that is kept: ``(B, heads, L, L)``."""

    weights: Tensor

    def attend(self, value: Tensor) -> Tensor:
        """``(B, heads, L, d) -> (B, heads, L, d)``."""
        return self.weights @ value


class SharedQK(NamedTuple):
    """Queries and keys that a map is made of when it is needed: ``(B, heads, L, d)`` each."""

    query: Tensor
    key: Tensor

    def attend(self, value: Tensor) -> Tensor:
        """``(B, heads, L, d) -> (B, heads, L, d)``."""
        return attention(self.query, self.key, value)


def shared_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sharing: Sharing = 'auto',
    overwrite: bool = False,
) -> tuple[Tensor, SharedMap | SharedQK]:
    """Attention whose map other layers use again.

    :func:`shared_attention_reference` says the same in plain arithmetic.

    Args:
        query, key, value: ``(B, heads, L, d)``.
        sharing: What is kept: the ``'map'``, or ``'query_key'``; ``'auto'`` takes what is faster,
            see :func:`keeps_map`.
        overwrite: Write the map over the last one of this thread that was written with
            ``overwrite``, which is much faster than into fresh memory. Only on a CPU and without
            gradients; otherwise of no effect.

    Returns:
        ``(B, heads, L, d)``, and what has ``attend(value)`` for the layers that follow.
    """
    if on_reference_path():
        return shared_attention_reference(query, key, value)
    training = torch.is_grad_enabled()
    if not keeps_map(sharing, query.shape[2], query.device, training):
        return attention(query, key, value), SharedQK(query, key)
    if training or query.device.type != 'cpu':
        return shared_attention_reference(query, key, value)
    return _write_map(query, key, value, overwrite)


def shared_attention_reference(
    query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, SharedMap]:
    """What :func:`shared_attention` computes, written out."""
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    shared = SharedMap(scores.softmax(dim=-1).to(value.dtype))  # autocast makes it fp32
    return shared.attend(value), shared


def keeps_map(sharing: Sharing, length: int, device: torch.device, training: bool) -> bool:
    """Whether a map of ``length`` tokens is kept, rather than queries and keys.

    ``'auto'`` keeps small maps on a CPU. A GPU's fused kernels never write a map to memory, where
    it would cost more than making it again.
    """
    if sharing != 'auto':
        return sharing == 'map'
    longest = KEEP_MAP_TOKENS_IN_TRAINING if training else KEEP_MAP_TOKENS
    return device.type == 'cpu' and length <= longest


@torch.compiler.disable  # which cannot trace products that are written into strided memory
def _write_map(
    query: Tensor, key: Tensor, value: Tensor, overwrite: bool
) -> tuple[Tensor, SharedMap]:
    """Scores, softmax and the product with values, as many rows at a time as stay in the cache."""
    if not runs_eagerly():
        return shared_attention_reference(query, key, value)
    batch, heads, length, dims = query.shape
    shape, dtype = (batch, heads, length, length), query.dtype
    weights = kept_memory(shape, dtype) if overwrite else query.new_empty(shape)
    # Laid out as the projection behind it wants: heads side by side
    out = value.new_empty(batch, length, heads, dims).transpose(1, 2)
    step = max(1, TILE_ELEMENTS // (min(length, TILE_ROWS) * length))
    for image in range(batch):
        for head in range(0, heads, step):
            some = slice(head, head + step)
            k, v = key[image, some].transpose(1, 2), value[image, some]
            for start in range(0, length, TILE_ROWS):
                rows = slice(start, start + TILE_ROWS)
                tile = weights[image, some, rows]
                q = query[image, some, rows]
                torch.baddbmm(tile, q, k, beta=0, alpha=dims**-0.5, out=tile)
                torch.softmax(tile, dim=-1, out=tile)
                torch.bmm(tile, v, out=out[image, some, rows])
    return out, SharedMap(weights)


def kept_memory(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Uninitialised memory on the CPU that each thread keeps for the next call.

    The system hands fresh memory out page by page, which takes longer than to compute a map. What
    is larger than :data:`KEPT_BUFFER_BYTES` is not kept.
    """
    size = torch.Size(shape).numel()
    buffer = getattr(_kept, 'buffer', None)
    if buffer is None or buffer.dtype != dtype or buffer.numel() < size:
        with torch.inference_mode(False):
            buffer = torch.empty(size, dtype=dtype, device='cpu')
        kept = size * dtype.itemsize <= KEPT_BUFFER_BYTES
        _kept.buffer = buffer if kept else None
    return buffer[:size].view(shape)
