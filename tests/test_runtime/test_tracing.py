import torch

from mmtoken.layers.common.windows import shifted_window_mask
from mmtoken.layers.stvit.neighborhood import NeighborhoodSpec, hidden_keys
from mmtoken.runtime.tracing import untraced


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
