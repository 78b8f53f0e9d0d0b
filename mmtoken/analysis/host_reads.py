"""How often a function waits for the device: the host reads a value that is computed there.

On a GPU each read stops the host until all kernels before it have run. Torch reports them there. On
a CPU nothing waits, so calls that would wait on a GPU are counted in their place.
"""

import warnings
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

WARNING = 'called a synchronizing CUDA operation'  # of torch
# Names of functions that return values to the host, or tensors whose shape depends on values.
READING = frozenset(
    (
        '__bool__', '__int__', '__float__', '__complex__', '__index__', '__contains__', '__array__',
        'allclose', 'argwhere', 'bincount', 'cpu', 'equal', 'is_nonzero', 'item', 'masked_select',
        'nonzero', 'numpy', 'tolist', 'unique', 'unique_consecutive',
    )
)  # fmt: skip


def count_host_reads(function: Callable[[], object], device: torch.device) -> Counter[str]:
    """Call a function and count how often it waits for the device.

    Args:
        function: Called once, without arguments. Call it before, so that plans are cached.
        device: Where it computes. On a CPU, reads are those of :data:`READING`, indexing with
            boolean masks and ``.to('cpu')``; reads inside of operators are not seen.

    Returns:
        Reads by name, as in ``Counter(tolist=1)``; on CUDA, which does not tell names, all under
        ``'synchronization'``.
    """
    if device.type != 'cuda':
        with _HostReads() as reads:
            function()
        return reads.counts
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        torch.cuda.set_sync_debug_mode('warn')
        try:
            function()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    number = sum(WARNING in str(warning.message) for warning in caught)
    return Counter(synchronization=number) if number else Counter()


class _HostReads(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, '__name__', '')
        if name in READING or _depends_on_values(name, args, kwargs):
            self.counts[name] += 1
        return func(*args, **kwargs)


def _depends_on_values(name: str, args: tuple, kwargs: dict) -> bool:
    """Whether these arguments make a function read, which with others does not."""
    if name == 'to':
        return 'cpu' in (*args[1:], kwargs.get('device'))
    if name == 'where':
        return len(args) + len(kwargs) == 1
    if name == '__getitem__':
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        return any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in index)
    return False
