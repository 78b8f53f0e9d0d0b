"""Index tables and masks that depend on shapes alone: made once per shape, on demand.

A process has one cache, :data:`PLANS`. It must stay valid whatever mode a network runs in (tracing,
export, fake tensors, ``torch.func``, inference mode, other default devices and dtypes). So plans
are made and kept outside of all these modes, and only the result of a call enters them.
"""

import operator
import threading
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterator
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...runtime.reference import is_compiling
from ...runtime.torch_private import in_dispatch_mode, in_transform

# Limit for each device. The plans of a whole network take 2 to 8 MB for an image of 800 x 1344, so
# the shapes of the last iterations stay cached.
BUDGET_BYTES = 64 * 2**20
# Larger plans are not kept, since one of them would evict all others.
LARGEST_BYTES = BUDGET_BYTES // 4
ENTRY_BYTES = 1024  # overhead of an entry, which bounds the number of small ones

TRACE_WARNING = (
    'the trace of an mmtoken network holds index tables of the image size, and in places of the '
    'batch size, that it was traced with: it fails for others. Trace once for each size'
)


class PlanCache:
    """A thread-safe least-recently-used cache with a limit in bytes.

    Args:
        budget: Bytes for each device.
        largest: Bytes above which an entry is not kept.
    """

    def __init__(self, budget: int, largest: int) -> None:
        self.budget = budget
        self.largest = largest
        self._lock = threading.Lock()
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()  # the last used one last
        self._used: Counter[torch.device] = Counter()

    def find(self, key: Hashable) -> Any:
        """The value of a key, or None."""
        with self._lock:
            if key not in self._entries:
                return None
            self._entries.move_to_end(key)
            return self._entries[key].value

    def keep(self, key: Hashable, value: Any) -> None:
        """Keep a plan, unless it is too large or on the meta device; evicts the oldest ones."""
        entry = _Entry(value, _bytes_by_device(value))
        sizes = entry.sizes
        if max(sizes.values()) > self.largest or torch.device('meta') in sizes:
            return
        with self._lock:
            if key in self._entries:
                self._drop(key)
            self._entries[key] = entry
            self._used.update(sizes)
            for device in sizes:
                while self._used[device] > self.budget:
                    self._drop(next(k for k, e in self._entries.items() if device in e.sizes))

    def clear(self) -> None:
        """Remove everything."""
        with self._lock:
            self._entries.clear()
            self._used.clear()

    def nbytes(self) -> dict[torch.device, int]:
        """Bytes in use on each device."""
        with self._lock:
            return {device: size for device, size in self._used.items() if size}

    def tensors(self) -> list[Tensor]:
        """All tensors that are kept."""
        with self._lock:
            return [t for e in self._entries.values() for t in _tensors(e.value)]

    def __len__(self) -> int:
        return len(self._entries)

    def _drop(self, key: Hashable) -> None:
        self._used.subtract(self._entries.pop(key).sizes)


class _Entry(NamedTuple):
    value: Any
    sizes: dict[torch.device, int]


PLANS = PlanCache(BUDGET_BYTES, LARGEST_BYTES)


def cache_by_shape(function: Callable) -> Callable:
    """Keep the results of a function in :data:`PLANS`.

    Arguments are numbers, strings, devices, dtypes, None, and tuples of these; sizes that a tracer
    represents are converted to numbers. Results are tensors or tuples; they are shared and must not
    be written to. The function makes tensors on the CPU unless it is given a device, and gives
    their dtypes itself, since the default dtype may be any.

    ``torch.compile`` does not trace it: the plan for the sizes that it compiles for is a constant
    of the graph, and other sizes have a graph of their own.
    """

    def find_or_make(*args, **kwargs):
        tracing = torch.jit.is_tracing()
        sizes = list(_tensors((args, *kwargs.values()))) if tracing else []
        args, kwargs = _plain(args), {name: _plain(value) for name, value in kwargs.items()}
        key = (function, args, *sorted(kwargs.items()))
        result = PLANS.find(key)
        if result is None:
            result = _make(function, args, kwargs)
            PLANS.keep(key, result)
        if tracing:
            warnings.warn(TRACE_WARNING, torch.jit.TracerWarning, stacklevel=4)
            return _bound_to(sizes, result)
        if in_dispatch_mode():
            # Dispatch modes see the tensors, as if they had just been created
            return _map_tensors(torch.ops.aten.lift_fresh, result)
        return result

    @torch.compiler.assume_constant_result
    def constant(*args, **kwargs):
        # In a tuple, since constants that are tensors all have the name of this function, which
        # AOTAutograd takes for the same tensor twice.
        args, kwargs = _unpacked(args), {name: _unpacked(kwargs[name]) for name in kwargs}
        return (find_or_make(*args, **kwargs),)

    @wraps(function)
    def plan(*args, **kwargs):
        if is_compiling():
            args, kwargs = _packed(args), {name: _packed(kwargs[name]) for name in kwargs}
            return constant(*args, **kwargs)[0]
        return find_or_make(*args, **kwargs)

    return plan


def compile_for_size(images: Tensor) -> None:
    """Let ``torch.compile`` make a graph for the height and width of ``(B, C, H, W)`` alone.

    Plans hold for one size, so graphs do too. To say it at the start spares torch.compile minutes
    of work with symbolic sizes.
    """
    if is_compiling():
        operator.index(images.shape[2])
        operator.index(images.shape[3])


def runs_eagerly() -> bool:
    """Whether operations are done on real tensors as they are called, and only that.

    Otherwise they are traced, intercepted or transformed, and new tensors may be invalid later.
    """
    return not (torch.jit.is_tracing() or in_dispatch_mode() or in_transform())


def _make(function: Callable, args: tuple, kwargs: dict) -> Any:
    def make() -> Any:
        # Autograd cannot save tensors that were made in inference mode.
        with torch.inference_mode(False), torch.autocast('cpu', enabled=False):
            return function(*args, **kwargs)

    def make_on_cpu() -> Any:
        with torch.device('cpu'):
            return make()

    # A default device, even the CPU, costs each operation a few microseconds.
    plain = runs_eagerly() and torch.empty(0).device.type == 'cpu'
    return make() if plain else _in_another_thread(make_on_cpu)


def _in_another_thread(function: Callable[[], Any]) -> Any:
    """Call a function outside of all tracing and dispatch modes, which are thread-local."""
    results: list[Any] = []
    errors: list[BaseException] = []

    def call() -> None:
        try:
            results.append(function())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def _plain(value: Any) -> Any:
    """An argument as part of a key, with sizes of tracers as numbers."""
    if value is None or isinstance(value, (bool, str, torch.device, torch.dtype)):
        return value
    if isinstance(value, tuple):
        parts = [_plain(part) for part in value]
        return type(value)(*parts) if hasattr(value, '_fields') else tuple(parts)
    return operator.index(value)


def _packed(value: Any) -> Any:
    """:func:`_plain` with the classes of named tuples in front of their parts.

    torch.compile of torch 2.13 loses the parts of a named tuple on the way to a constant.
    """
    if not isinstance(value, tuple):
        return _plain(value)
    parts = [_packed(part) for part in value]
    return (type(value), *parts) if hasattr(value, '_fields') else tuple(parts)


def _unpacked(value: Any) -> Any:
    """The inverse of :func:`_packed`."""
    if not isinstance(value, tuple):
        return value
    if value and isinstance(value[0], type):
        return value[0](*map(_unpacked, value[1:]))
    return tuple(map(_unpacked, value))


def _bound_to(sizes: list[Tensor], plan: Any) -> Any:
    """A plan that makes the trace fail for other sizes than its own."""
    first = next(_tensors(plan), None)
    zero = torch.zeros(())
    for size in sizes:
        length = operator.index(size) + 1  # a length of 1 could be expanded to any
        zero = zero + torch.zeros(length).expand(size + 1)[0]
    return _map_tensors(lambda t: t + zero.to(t) if t is first else t, plan)


def _map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple):
        parts = [_map_tensors(function, part) for part in value]
        return type(value)(*parts) if hasattr(value, '_fields') else tuple(parts)
    return value


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from _tensors(part)


def _bytes_by_device(value: Any) -> dict[torch.device, int]:
    """Memory of the tensors of a plan; storage that views share counts once."""
    sizes = {torch.device('cpu'): ENTRY_BYTES}
    storages = {t.untyped_storage()._cdata: t for t in _tensors(value)}
    for tensor in storages.values():
        size = tensor.untyped_storage().nbytes()
        sizes[tensor.device] = sizes.get(tensor.device, 0) + size
    return sizes
