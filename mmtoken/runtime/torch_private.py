"""All that this package uses of torch's private interface, in one place.

Nothing public tells these things. Each function is tested, so that a release of torch which changes
one of them is found by the test, not by users. Checked with torch 2.1 to 2.11.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

# Public since torch 2.2. Chosen once: torch.compile cannot trace the choice.
is_compiling = getattr(torch.compiler, 'is_compiling', None) or torch._utils.is_compiling


def in_backward() -> bool:
    """Whether this thread is working on a backward pass."""
    return torch._C._current_graph_task_id() != -1


@contextmanager
def untraced() -> Iterator[None]:
    """Inside this context ``torch.jit.trace`` records nothing.

    In a trace sizes are tensors. Values that depend on sizes alone are computed outside of it and
    are constants in it.
    """
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)
    try:
        yield
    finally:
        torch._C._set_tracing_state(state)


def in_dispatch_mode() -> bool:
    """Whether a ``TorchDispatchMode`` sees the operations."""
    return bool(torch._C._len_torch_dispatch_stack())


def in_transform() -> bool:
    """Whether ``torch.func`` is transforming what is called."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def is_without_values(x: Tensor) -> bool:
    """Whether a tensor is on the meta device, fake, or transformed by ``torch.func``."""
    transformed = torch._C._functorch.is_functorch_wrapped_tensor(x)
    return x.is_meta or isinstance(x, FakeTensor) or transformed


def records_of_archive(path: Path) -> list[str]:
    """Names of the records of a zip file that torch wrote."""
    return torch._C.PyTorchFileReader(str(path)).get_all_records()


def rebuild_tensor(storage, offset: int, size: tuple, stride: tuple) -> Tensor:
    """The tensor that a pickle describes."""
    return torch._utils._rebuild_tensor(storage, offset, size, stride)


@cache
def has_bfloat16_products() -> bool:
    """Whether the CPU multiplies bfloat16 by AVX-512, not by AMX; False where torch cannot tell."""
    avx, amx = (
        getattr(torch.cpu, name, lambda: False)
        for name in ('_is_avx512_bf16_supported', '_is_amx_tile_supported')
    )
    return avx() and not amx()
