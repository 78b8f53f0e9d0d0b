"""Code for GPUs, on tensors that have a shape, a dtype and a CUDA device, but no values."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from helpers import TORCH_2_1
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from mmtoken.layers.common import cache

CUDA = torch.device('cuda', 0)


class _PlansToFake(TorchFunctionMode):
    """Plans are made on the CPU; what they move to a GPU becomes fake there."""

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()
        self.mode = mode

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        devices = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.device)]
        if any(device.type == 'cuda' for device in devices):
            args = tree_map_only(Tensor, self.mode.from_tensor, args)
            with self.mode:
                return func(*args, **kwargs)
        return func(*args, **kwargs)


@contextmanager
def fake_cuda(monkeypatch) -> Iterator[FakeTensorMode]:
    """Inside this context tensors are fake, and may be on CUDA without a GPU."""
    if TORCH_2_1 and not torch.cuda.is_available():
        pytest.skip('torch 2.1 needs the driver of a GPU for fake tensors too')
    mode, make = FakeTensorMode(), cache._in_another_thread

    def make_fake(function):
        def inside():
            with _PlansToFake(mode):
                return function()

        return make(inside)

    monkeypatch.setattr(cache, '_in_another_thread', make_fake)
    monkeypatch.setattr(cache, 'PLANS', cache.PlanCache(2**20, 2**20))
    with mode:
        yield mode


def call_on_cuda(mode: FakeTensorMode, model: nn.Module, images: Tensor, dtype: torch.dtype):
    """Outputs of a model on the CPU for images of the CPU, both as if they had been moved."""

    def move(tensor: Tensor) -> Tensor:
        return mode.from_tensor(tensor).to(CUDA, dtype if tensor.is_floating_point() else None)

    state = {k: move(v) for k, v in [*model.named_parameters(), *model.named_buffers()]}
    run = partial(torch.func.functional_call, model, state)
    images = move(images)
    with torch.no_grad(), Calls() as calls, OnCpu() as on_cpu:
        maps = run((images,))
    return maps, calls.names, on_cpu.operations


class Calls(TorchFunctionMode):
    """Counts the functions of torch that are called, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names[getattr(func, '__name__', str(func))] += 1
        return func(*args, **(kwargs or {}))


class OnCpu(TorchDispatchMode):
    """Counts the operators whose results are on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = (leaf for leaf in tree_flatten(result)[0] if isinstance(leaf, Tensor))
        self.operations[str(func)] += sum(t.device.type == 'cpu' for t in tensors)
        return result
