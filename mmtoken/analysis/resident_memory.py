"""The memory of this process and its peak, as Linux tells it."""

import ctypes
import re
from collections.abc import Callable
from pathlib import Path

MEBIBYTE = 2**20
CLEAR_REFS = Path('/proc/self/clear_refs')


def resident_peak_mb(step: Callable[[], object]) -> float:
    """How far a function raises the resident memory of this process, in MiB.

    It must be a fresh process, in which something small has been run before, since memory that was
    freed is used again without being counted.
    """
    ctypes.CDLL(None).malloc_trim(0)  # or the step would reuse what was freed before, uncounted
    CLEAR_REFS.write_text('5')  # sets the peak to what is resident now
    before = resident_bytes()
    step()
    return (_status('VmHWM') - before) / MEBIBYTE


def resident_bytes() -> int:
    """The resident memory of this process."""
    return _status('VmRSS')


def _status(key: str) -> int:
    """A value of ``/proc/self/status``, in bytes."""
    kilobytes = re.search(rf'{key}:\s*(\d+) kB', Path('/proc/self/status').read_text())[1]
    return int(kilobytes) * 1024
