import subprocess
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mmtoken.layers.common.windows import shifted_window_mask
from mmtoken.layers.stvit.neighborhood import NeighborhoodSpec, hidden_keys
from mmtoken.runtime.torch_private import (
    in_backward,
    in_dispatch_mode,
    in_transform,
    is_without_values,
    rebuild_tensor,
    records_of_archive,
    untraced,
)


def trace(function, x):
    return torch.jit.trace(function, x, check_trace=False)


def test_nothing_is_recorded():
    def function(x):
        with untraced():
            constant = x.shape[0] * torch.ones(2)
        assert torch.jit.is_tracing()
        return x + constant

    graph = str(trace(function, torch.zeros(2)).graph)
    assert 'aten::add' in graph and 'aten::ones' not in graph and 'aten::mul' not in graph
    assert not torch.jit.is_tracing()


def test_plans_of_a_trace_are_those_of_eager_runs():
    def function(x):
        grid = tuple(x.shape[1:3])
        mask = shifted_window_mask(grid, 4, 2, torch.device('cpu'), torch.float32)
        spec = NeighborhoodSpec(grid, 4, grid, 4, 8, (grid[0] - 8, 0), 'exact')
        return x.sum() + mask.exp(), x.sum() * hidden_keys(spec)

    # A size that no other test has, so that the plan is made in the trace
    traced, x = trace(function, torch.zeros(1, 10, 13, 1)), torch.ones(1, 10, 13, 1)
    graph = str(traced.graph)
    assert 'aten::roll' not in graph and 'aten::arange' not in graph
    for a, b in zip(traced(x), function(x), strict=True):
        assert torch.equal(a, b)


def test_backward_is_recognized():
    seen = []
    x = torch.ones(2, requires_grad=True)
    x.register_hook(lambda grad: seen.append(in_backward()))
    assert not in_backward()
    x.sum().backward()
    assert seen == [True] and not in_backward()


def test_dispatch_modes_are_recognized():
    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    assert not in_dispatch_mode()
    with Mode():
        assert in_dispatch_mode()
    assert not in_dispatch_mode()


def test_transforms_and_fake_tensors_are_recognized():
    seen = []

    def function(x):
        seen.append((in_transform(), is_without_values(x)))
        return x.sum()

    function(torch.ones(2))
    torch.func.grad(function)(torch.ones(2))
    assert seen == [(False, False), (True, True)] and not in_transform()
    assert is_without_values(torch.ones(2, device='meta'))
    with FakeTensorMode() as mode:
        assert is_without_values(mode.from_tensor(torch.ones(2)))


def test_records_and_tensors_of_files(tmp_path):
    torch.save(torch.ones(2), tmp_path / 'a.pth')
    assert 'data.pkl' in records_of_archive(tmp_path / 'a.pth')
    storage = torch.arange(6.0).untyped_storage()
    typed = torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32, _internal=True)
    assert rebuild_tensor(typed, 1, (2, 2), (2, 1)).tolist() == [[1, 2], [3, 4]]


def test_nothing_private_is_used_elsewhere():
    root = Path(__file__).resolve().parents[2]
    found = subprocess.run(
        ['git', 'grep', '-lE', r'torch\._(C|utils|subclasses)\b', '--', 'mmtoken/*.py'],
        cwd=root, capture_output=True, text=True,
    )  # fmt: skip
    names = {'mmtoken/runtime/torch_private.py', 'mmtoken/checkpoints/restricted_unpickler.py'}
    assert set(found.stdout.split()) == names  # the latter has names that files may contain
