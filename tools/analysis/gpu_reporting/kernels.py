"""Attention kernels in several forms, on the same inputs."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from mmtoken.layers.common import attention as ours
from mmtoken.layers.common.attention import (
    join_heads,
    split_heads,
    varlen_attention,
    varlen_attention_padded,
    varlen_attention_reference,
)
from mmtoken.layers.stvit.neighborhood import (
    NeighborhoodSpec,
    hidden_keys,
    neighborhood_attention,
    neighborhood_attention_reference,
)

HEAD_CHANNELS = 64


@dataclass(frozen=True)
class Form:
    """One form of a kernel.

    Attributes:
        prepare: Makes a function without arguments that runs it. Takes a size, ``'small'`` or
            ``'tiny'``, the images of a batch, a device and a dtype. What does not depend on values
            of tensors is made here, as a network makes it once for a shape.
        on_cpu: Whether a CPU can run it.
    """

    prepare: Callable[[str, int, torch.device, torch.dtype], Callable[[], Tensor]]
    on_cpu: bool = True


def noise(*shape: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The same in every call."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).to(device, dtype)


def flex_attention(device: torch.device) -> Callable:
    """Torch's attention under a block mask; compiled on a GPU, where it is made for that.

    Raises:
        ImportError: Torch before 2.5.
    """
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False) if device.type == 'cuda' else flex_attention


# Packed sequences of unequal lengths, as MSViT has them on images of 1024 x 1024


def packed_inputs(
    size: str, batch_size: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """Queries, keys and values ``(M, heads, d)``, and lengths that rise from image to image."""
    heads, shortest, longest = (6, 1500, 3100) if size == 'small' else (2, 20, 60)
    lengths = torch.linspace(shortest, longest, batch_size).long().tolist()
    shape = (3, sum(lengths), heads, HEAD_CHANNELS)
    return *noise(*shape, device=device, dtype=dtype), lengths


def prepare_packed(form: Callable, *setting) -> Callable[[], Tensor]:
    """One of the functions of ``mmtoken.layers.common.attention``."""
    return partial(form, *packed_inputs(*setting))


def torch_kernel(query: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> Tensor:
    """Torch's kernel for packed sequences.

    Raises:
        ImportError: Torch before 2.10.
    """
    if ours.varlen_attn is None:
        raise ImportError('torch.nn.attention.varlen needs torch 2.10 or newer')
    return ours.varlen_kernel(query, key, value, lengths, lengths)


def prepare_packed_flex(
    size: str, batch_size: int, device: torch.device, dtype: torch.dtype
) -> Callable[[], Tensor]:
    """One sequence of all images, in which a mask separates them."""
    from torch.nn.attention.flex_attention import create_block_mask

    *tensors, lengths = packed_inputs(size, batch_size, device, dtype)
    image = torch.arange(batch_size).repeat_interleave(torch.tensor(lengths)).to(device)
    mask = create_block_mask(
        lambda b, h, query, key: image[query] == image[key],
        None, None, sum(lengths), sum(lengths), device=str(device),
    )  # fmt: skip
    attend = flex_attention(device)

    def run() -> Tensor:
        query, key, value = (t.transpose(0, 1)[None] for t in tensors)
        return attend(query, key, value, block_mask=mask)[0].transpose(0, 1)

    return run


# Semantic tokens of STViT-R that attend to the image tokens around their window, third stage


def neighborhood_inputs(
    size: str, batch_size: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, int, NeighborhoodSpec]:
    """Queries ``(B, h, w, C)``, keys and values of the image ``(B, H, W, 2 * C)``, heads, geometry.

    Keys and values are 0 at the padding, as linear projections without bias make them.
    """
    grid, heads = ((50, 80), 12) if size == 'small' else ((10, 16), 2)
    spec = NeighborhoodSpec(
        query_grid=tuple(-(-side // 7) * 3 for side in grid),
        query_window_size=3,
        key_grid=grid,
        key_window_size=7,
        patch_size=21,
        padded_hw=tuple(-side % 7 for side in grid),
        pad_mask='released',
    )
    channels = heads * HEAD_CHANNELS // 2
    query = noise(batch_size, *spec.query_grid, channels, device=device, dtype=dtype)
    key_value = noise(batch_size, *grid, 2 * channels, device=device, dtype=dtype)
    return query, key_value, heads, spec


def prepare_groups(*setting) -> Callable[[], Tensor]:
    """Groups of windows attend to the union of their patches."""
    query, key_value, heads, spec = neighborhood_inputs(*setting)
    padded = F.pad(key_value.flatten(1, 2), (0, 0, 0, 1))
    return partial(neighborhood_attention, query, padded, heads, spec)


def prepare_copies(*setting) -> Callable[[], Tensor]:
    """Each window attends to a copy of its patch."""
    query, key_value, heads, spec = neighborhood_inputs(*setting)
    padded = F.pad(key_value, (0, 0, *spec.padding))
    return partial(neighborhood_attention_reference, query, padded, heads, spec)


def prepare_neighborhood_flex(*setting) -> Callable[[], Tensor]:
    """All queries attend to the padded grid, in which a mask hides what is not in their patch."""
    from torch.nn.attention.flex_attention import create_block_mask

    query, key_value, heads, spec = neighborhood_inputs(*setting)
    padded = F.pad(key_value, (0, 0, *spec.padding))
    (query_width, key_width), device = (query.shape[2], padded.shape[2]), query.device
    size, stride, side = spec.query_window_size, spec.key_window_size, spec.patch_size
    columns, hidden = spec.num_windows[1], hidden_keys(spec).to(device)

    def visible(b, h, q, k):
        row, column = q // query_width // size, q % query_width // size  # of the window
        y, x = k // key_width - row * stride, k % key_width - column * stride  # in its patch
        inside = (y >= 0) & (y < side) & (x >= 0) & (x < side)
        place = y.clamp(0, side - 1) * side + x.clamp(0, side - 1)
        return inside & ~hidden[row * columns + column, place]

    queries, keys = query[0, ..., 0].numel(), padded[0, ..., 0].numel()
    mask = create_block_mask(visible, None, None, queries, keys, device=str(device))
    attend = flex_attention(device)

    def run() -> Tensor:
        parts = query.flatten(1, 2), *padded.flatten(1, 2).chunk(2, dim=-1)
        out = attend(*(split_heads(part, heads) for part in parts), block_mask=mask)
        return join_heads(out).view_as(query)

    return run


# The first form of each is the reference.
KERNELS = {
    'packed': {
        'loop over images': Form(partial(prepare_packed, varlen_attention_reference)),
        'mmtoken': Form(partial(prepare_packed, varlen_attention)),
        'varlen kernel': Form(partial(prepare_packed, torch_kernel), on_cpu=False),
        'padded': Form(partial(prepare_packed, varlen_attention_padded)),
        'flex_attention': Form(prepare_packed_flex),
    },
    'neighborhood': {
        'copied patches': Form(prepare_copies),
        'mmtoken': Form(prepare_groups),
        'flex_attention': Form(prepare_neighborhood_flex),
    },
}
