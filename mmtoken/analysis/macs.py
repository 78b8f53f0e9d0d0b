"""Multiply-accumulates of a forward pass, fused attention included."""

from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode


def count_macs(function: Callable, *args, **kwargs) -> int:
    """Count the multiply-accumulates of matrix products, convolutions and attention in a call.

    Args:
        function: A module or any other callable.
        args, kwargs: Its arguments.

    Returns:
        Multiply-accumulates, half of the floating-point operations torch counts.
    """
    # Torch's counter has no entry for the fused CPU kernel, and so counts 0 for it.
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with (
        torch.no_grad(),
        FlopCounterMode(display=False, custom_mapping={kernel: _attention_flops}) as counter,
    ):
        function(*args, **kwargs)
    return counter.get_total_flops() // 2


def _attention_flops(query, key, value, *args, out_shape=None, **kwargs) -> int:
    batch, heads, num_queries, dims = query
    num_keys, value_dims = key[-2], value[-1]
    return 2 * batch * heads * num_queries * num_keys * (dims + value_dims)
