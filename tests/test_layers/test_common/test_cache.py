import threading
import warnings
from typing import NamedTuple

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mmtoken.layers.common.cache import PLANS, PlanCache, cache_by_shape
from mmtoken.layers.common.regions import make_region_layout
from mmtoken.layers.common.windows import shifted_window_mask
from mmtoken.layers.stvit.neighborhood import NeighborhoodSpec, plan_groups

CPU = torch.device('cpu')
KILO = 1024


class Table(NamedTuple):
    index: torch.Tensor
    sizes: tuple[int, ...]


@cache_by_shape
def table(sizes, device=CPU):
    return Table(torch.arange(sizes[0]).to(device), sizes)


class Untouched(TorchDispatchMode):
    """Does nothing."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def empty():
    PLANS.clear()


def is_plain(tensor):
    return (
        type(tensor) is torch.Tensor
        and tensor.device.type == 'cpu'
        and not tensor.is_inference()
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


def test_plans_are_shared():
    assert table((3, 4)) is table((3, 4))
    assert table((3, 4)).index is table(torch.Size([3, 4])).index
    assert table((3, 5)) is not table((3, 4))


def traced(call):
    torch.jit.trace(lambda x: x + call(tuple(x.shape)).index, torch.zeros(3), check_trace=False)


def transformed(call):
    torch.func.grad(lambda x: (x * call((3,)).index).sum())(torch.ones(3))
    torch.func.vmap(lambda x: x * call((3,)).index)(torch.ones(2, 3))


def under(context):
    def run(call):
        with context():
            call((3,))

    return run


MODES = dict(
    inference=under(torch.inference_mode),
    meta=under(lambda: torch.device('meta')),
    fake=under(FakeTensorMode),
    watched=under(Untouched),
    autocast=under(lambda: torch.autocast('cpu', torch.bfloat16)),
    traced=traced,
    transformed=transformed,
)


@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning')
@pytest.mark.parametrize('mode', MODES)
def test_plans_are_made_outside_of_all_modes(mode):
    MODES[mode](table)
    tensors = PLANS.tensors()
    assert tensors and all(map(is_plain, tensors))
    assert table((3,)).index.equal(torch.arange(3)) and table((3,)).sizes == (3,)
    assert len(PLANS) == 1, 'not the same plan as before'


def test_plans_enter_fake_mode():
    table((3,))
    with FakeTensorMode():
        assert (torch.ones(3) * table((3,)).index).shape == (3,)


def test_the_default_type_does_not_matter():
    torch.set_default_dtype(torch.float64)
    try:
        regions = make_region_layout((5, 7), (1, 2), 2)
    finally:
        torch.set_default_dtype(torch.float32)
    assert regions.center.dtype == torch.float32


def test_what_fails_leaves_nothing():
    @cache_by_shape
    def fail(size):
        raise KeyError(size)

    for context in (Untouched, torch.no_grad):
        with context(), pytest.raises(KeyError, match='3'):
            fail(3)
    assert len(PLANS) == 0


def test_the_meta_device_has_no_plans_worth_keeping():
    assert table((3,), device=torch.device('meta')).index.is_meta
    assert len(PLANS) == 0


def test_a_trace_warns():
    with pytest.warns(torch.jit.TracerWarning, match='Trace once for each size'):
        traced(table)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        table((3,))


@pytest.fixture
def cache():
    return PlanCache(budget=100 * KILO, largest=40 * KILO)


def kilobytes(size):
    """With what an entry costs beside."""
    return torch.empty((size - 1) * KILO, dtype=torch.uint8)


def test_the_oldest_make_place(cache):
    for i in range(3):
        cache.keep(i, kilobytes(30))
    assert cache.find(0) is not None  # now the last one used
    cache.keep(3, kilobytes(30))
    assert [cache.find(i) is None for i in range(4)] == [False, True, False, False]
    assert cache.nbytes() == {CPU: 90 * KILO}


def test_large_plans_are_not_kept(cache):
    cache.keep('small', kilobytes(20))
    cache.keep('large', kilobytes(41))
    assert cache.find('large') is None and cache.find('small') is not None


def test_plans_without_tensors_are_bounded_too(cache):
    for i in range(200):
        cache.keep(i, None)
    assert len(cache) == 100


def test_views_hold_the_whole(cache):
    whole = kilobytes(30)
    cache.keep('views', (whole[:10], (whole[10:],)))
    cache.keep('views', (whole[:10], (whole[10:],)))
    assert cache.nbytes() == {CPU: 30 * KILO}
    cache.clear()
    assert len(cache) == 0 and cache.nbytes() == {}


def test_threads_may_share(cache):
    def work(start):
        for i in range(2000):
            key = (start + i * 7) % 23
            cache.keep(key, kilobytes(1 + key))
            found = cache.find(key)
            assert found is None or len(found) == key * KILO
            finished.append(i) if i == 1999 else None

    finished = []
    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(finished) == 4 and cache.nbytes()[CPU] <= cache.budget


def test_multi_scale_training_fits():
    """The plans of STViT-R for 40 sizes of image; its masks alone were 200 MB before."""
    sizes = [(480 + 32 * (i % 11), 800 + 32 * (i % 17)) for i in range(40)]
    for height, width in sizes:
        for stride in (4, 8, 32):
            shifted_window_mask((height // stride, width // stride), 7, 3, CPU, torch.float32)
        grid = (height // 16, width // 16)
        pooled = tuple(-(-side // 7) * 3 for side in grid)
        padding = tuple(-side % 7 for side in grid)
        for spec in (
            NeighborhoodSpec(pooled, 3, grid, 7, 21, padding, 'released'),
            NeighborhoodSpec(grid, 7, pooled, 3, 27, padding, 'released'),
        ):
            plan_groups(spec, CPU, torch.float32)
    assert len(PLANS) == 40 * 5
    assert PLANS.nbytes()[CPU] < PLANS.budget / 2
