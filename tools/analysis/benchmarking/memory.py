"""Peak memory of a step, above what the network holds before it.

On CUDA this is the peak of torch's allocator. On the CPU torch keeps no count, and memory that one
network freed is reused by the next, so each network runs in a fresh process, and the peak of its
resident memory is read from Linux. Both include gradients in training, and exclude weights and
images.
"""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import torch

from mmtoken.analysis.resident_memory import CLEAR_REFS, MEBIBYTE, resident_peak_mb

from .step import Setting, make_step
from .targets import BenchmarkTarget

WARM_UP_SIDE = 64  # pixels


def peak_mb(target: BenchmarkTarget, setting: Setting, step: Callable[[], object]) -> float | None:
    """Peak of a step in MiB; None on a CPU without Linux.

    Args:
        target: The network.
        setting: How it is run; on a CPU it is not compiled.
        step: The same step, warmed up, for CUDA.
    """
    if setting.device.type == 'cuda':
        return peak_on_cuda(step)
    return peak_on_cpu(target, setting) if CLEAR_REFS.exists() else None


def peak_on_cpu(target: BenchmarkTarget, setting: Setting) -> float:
    """Peak of a step in MiB.

    Raises:
        OSError: This is not Linux.
    """
    if not CLEAR_REFS.exists():
        raise OSError(f'the peak memory of a CPU is read from Linux; {CLEAR_REFS} is missing')
    context = multiprocessing.get_context('spawn')
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(_peak_here, target, replace(setting, compiled=False)).result()


def peak_on_cuda(step: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / MEBIBYTE


def _peak_here(target: BenchmarkTarget, setting: Setting) -> float:
    torch.set_num_threads(setting.threads)
    network = target.build()
    # A step on small images loads libraries and starts thread pools.
    small = replace(setting, shape=tuple(min(side, WARM_UP_SIDE) for side in setting.shape))
    warm_up, step = (make_step(target, network, s) for s in (small, setting))
    warm_up()
    return resident_peak_mb(step)
