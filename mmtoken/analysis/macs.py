"""Multiply-accumulates of a forward pass, fused attention included."""

from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..layers.common.plain import hooks_ignored

# Fused attention that torch's counter has no entry for, and so counts 0 for. Which of these
# exist depends on the version of torch.
UNCOUNTED_KERNELS = (
    '_scaled_dot_product_flash_attention_for_cpu',
    '_scaled_dot_product_cudnn_attention',
    '_scaled_dot_product_fused_attention_overrideable',
)


def count_macs(function: Callable, *args, **kwargs) -> int:
    """Count the multiply-accumulates of matrix products, convolutions and attention in a call.

    What is counted is what runs: the fast path, unless the caller enters
    :func:`~mmtoken.runtime.reference.reference_path`.

    Args:
        function: A module or any other callable.
        args, kwargs: Its arguments.

    Returns:
        Multiply-accumulates, half of the floating-point operations torch counts.
    """
    # Torch's counter hangs hooks on all modules.
    with torch.no_grad(), hooks_ignored(), make_counter() as counter:
        function(*args, **kwargs)
    return counter.get_total_flops() // 2


def make_counter() -> FlopCounterMode:
    """Torch's counter of floating-point operations, with the attention kernels it lacks."""
    kernels = [name for name in UNCOUNTED_KERNELS if hasattr(torch.ops.aten, name)]
    return FlopCounterMode(
        display=False,
        custom_mapping={getattr(torch.ops.aten, name): _attention_flops for name in kernels},
    )


def _attention_flops(query, key, value, *args, out_shape=None, **kwargs) -> int:
    batch, heads, num_queries, dims = query
    num_keys, value_dims = key[-2], value[-1]
    return 2 * batch * heads * num_queries * num_keys * (dims + value_dims)
