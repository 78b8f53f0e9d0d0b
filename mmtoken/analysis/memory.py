"""Peak memory of a step, above what the network holds before it.

On CUDA this is what torch's allocator hands out at most. On a CPU torch does not keep count, and
what one network frees another reuses; so each network is measured in a fresh process, as the peak
of the resident memory that the operating system counts. Both include gradients in training, and
exclude weights and images.
"""

import ctypes
import multiprocessing
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from .step import make_images, make_step
from .subject import Subject

WARM_UP_SIDE = 64  # pixels
MEGABYTE = 2**20


def peak_mb_on_cuda(step: Callable[[], object]) -> float:
    """Peak of a step that is warmed up, in MiB."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / MEGABYTE


def peak_mb_on_cpu(
    subject: Subject,
    batch_size: int,
    shape: tuple[int, int],
    dtype: torch.dtype = torch.float32,
    train: bool = False,
    threads: int = 1,
) -> float | None:
    """Peak of a step in a process of its own, in MiB; None where the system does not tell (Linux).

    The step runs once before on a small image, so that libraries are loaded and their thread pools
    made.
    """
    if not Path('/proc/self/clear_refs').exists():
        return None
    context = multiprocessing.get_context('spawn')
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(
            _measure_peak, subject, batch_size, shape, dtype, train, threads
        ).result()


def _measure_peak(
    subject: Subject,
    batch_size: int,
    shape: tuple[int, int],
    dtype: torch.dtype,
    train: bool,
    threads: int,
) -> float:
    torch.set_num_threads(threads)
    network, cpu = subject.build(), torch.device('cpu')
    small = tuple(min(side, WARM_UP_SIDE) for side in shape)
    images = [
        make_images(batch_size, sides, dtype, cpu, subject.in_channels) for sides in (small, shape)
    ]
    warm_up, step = (
        make_step(network, x, train, mixed=subject.mixed, inside=subject.overriding) for x in images
    )
    warm_up()
    # What construction and the small image freed must not serve the step unseen.
    ctypes.CDLL(None).malloc_trim(0)
    Path('/proc/self/clear_refs').write_text('5')  # sets the peak to what is resident now
    before = _status('VmRSS')
    step()
    return (_status('VmHWM') - before) / MEGABYTE


def _status(key: str) -> int:
    """A figure of ``/proc/self/status``, in bytes."""
    kilobytes = re.search(rf'{key}:\s*(\d+) kB', Path('/proc/self/status').read_text())[1]
    return int(kilobytes) * 1024
