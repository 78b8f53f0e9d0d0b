"""CUDA graphs: kernels that are launched once by the host, and then again all at once."""

from collections.abc import Callable

import torch

WARM_UP_CALLS = 3


def capture(function: Callable[[], object]) -> Callable[[], None]:
    """Record the kernels of a function, and return a function that runs them again.

    Args:
        function: Without arguments; it must not read values back from the device.

    Raises:
        RuntimeError: It does something that cannot be recorded.
    """
    # On a side stream, so that what libraries set up at their first call is not recorded.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP_CALLS):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay
