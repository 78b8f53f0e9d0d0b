"""Where the time of a step goes, by kind of work."""

from collections import Counter
from collections.abc import Callable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

# Operators of torch by kind of work, in the order of the table. A backward operator has its own
# name, or that of an operator of the forward pass.
KINDS = {
    'matrix products': 'mm addmm bmm baddbmm addbmm linear matmul',
    'convolutions': 'mkldnn_convolution convolution thnn_conv2d cudnn_convolution '
    'convolution_backward _slow_conv2d_forward',
    'attention': '_scaled_dot_product_flash_attention_for_cpu '
    '_scaled_dot_product_flash_attention_for_cpu_backward _scaled_dot_product_flash_attention '
    '_scaled_dot_product_efficient_attention _flash_attention_forward _flash_attention_backward '
    '_efficient_attention_forward _efficient_attention_backward _softmax '
    '_softmax_backward_data',
    'normalization': 'native_layer_norm native_layer_norm_backward native_batch_norm '
    'native_batch_norm_backward cudnn_batch_norm',
    'activations': 'gelu gelu_ gelu_backward relu relu_ threshold_backward silu silu_',
    'copies and indices': 'copy_ clone cat stack index index_select index_copy_ index_copy '
    'index_add_ index_add index_put_ gather scatter scatter_ scatter_add_ fill_ zero_ '
    'constant_pad_nd roll flip repeat nonzero take_along_dim embedding _pad_circular '
    'index_select_backward',
    'sums and products': 'add add_ sub sub_ mul mul_ div div_ addcmul addcmul_ mean sum pow exp '
    'sigmoid neg rsqrt hardswish hardswish_ masked_fill masked_fill_ maximum',
}
OTHER = 'other'
_KIND_OF = {f'aten::{name}': kind for kind, names in KINDS.items() for name in names.split()}


def profile_step(step: Callable[[], object], device: torch.device, calls: int = 3) -> dict:
    """Milliseconds of a call by kind of work, each operator without those that it calls.

    Args:
        step: Warmed up.
        device: Where it runs. On CUDA the times are those of kernels.
        calls: That are averaged.
    """
    on_cuda = device.type == 'cuda'
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_cuda]
    with profile(activities=activities) as profiler:
        for _ in range(calls):
            step()
    times = Counter(dict.fromkeys((*KINDS, OTHER), 0.0))
    for event in profiler.key_averages():
        if on_cuda and event.device_type == DeviceType.CUDA:
            continue  # a kernel, whose time is that of its operator as well
        us = event.self_device_time_total if on_cuda else event.self_cpu_time_total
        times[_KIND_OF.get(event.key, OTHER)] += us / 1e3 / calls
    return dict(times)
