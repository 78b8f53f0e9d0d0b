import warnings

import pytest
import torch
from helpers import TORCH_2_1

from mmtoken.analysis.host_reads import WARNING, count_host_reads

CPU = torch.device('cpu')


def one_if(x):
    return 1 if x.any() else 0


@pytest.mark.parametrize(
    'name, read',
    [
        ('tolist', lambda x: x.tolist()),
        ('item', lambda x: x[0].item()),
        ('__bool__', one_if),
        ('__int__', lambda x: int(x[0])),
        ('__float__', lambda x: float(x[0])),
        ('__index__', lambda x: range(x[0])),
        ('__contains__', lambda x: 3 in x),
        ('cpu', lambda x: x.cpu()),
        ('to', lambda x: x.to('cpu')),
        ('to', lambda x: x.to(device='cpu')),
        ('numpy', lambda x: x.numpy()),
        ('nonzero', lambda x: x.nonzero()),
        ('where', lambda x: torch.where(x > 1)),
        ('unique', lambda x: x.unique()),
        ('masked_select', lambda x: x.masked_select(x > 1)),
        ('bincount', lambda x: torch.bincount(x)),
        pytest.param(
            '__getitem__',
            lambda x: x[x > 1],
            marks=pytest.mark.skipif(TORCH_2_1, reason='torch 2.1 hides it from modes'),
        ),
        ('__getitem__', lambda x: x[None][:, x > 1]),
    ],
)
def test_reads(name, read):
    assert count_host_reads(lambda: read(torch.arange(4)), CPU) == {name: 1}


@pytest.mark.parametrize(
    'compute',
    [
        lambda x: x[1:] + x[x.flip(0)][1:],
        lambda x: torch.where(x > 1, x, 0),
        lambda x: x.to(torch.float64).to(x.device),
        lambda x: x.new_zeros(len(x)).scatter_(0, x, x).sum(),
    ],
)
def test_computations_read_nothing(compute):
    assert not count_host_reads(lambda: compute(torch.arange(4)), CPU)


def test_torch_tells_on_a_gpu(monkeypatch):
    modes = [0]
    monkeypatch.setattr(torch.cuda, 'get_sync_debug_mode', lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, 'set_sync_debug_mode', modes.append)

    def step():
        assert modes[-1] == 'warn'
        for text in (f'{WARNING} (Triggered internally)', 'of another kind', WARNING):
            warnings.warn(text, stacklevel=1)

    assert count_host_reads(step, torch.device('cuda')) == {'synchronization': 2}
    assert modes == [0, 'warn', 0]

    def fail():
        raise RuntimeError('out of cheese')

    with pytest.raises(RuntimeError):
        count_host_reads(fail, torch.device('cuda'))
    assert modes[-1] == 0
