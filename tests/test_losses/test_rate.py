import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from mmengine.registry import MODELS
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mmtoken.losses import CoarseRatioLoss

INPUTS = torch.arange(3 * 2 * 4, dtype=torch.float32).view(3, 2, 4) / 24
REAL = torch.ones(3, 2, 4, dtype=torch.bool)
REAL[1, :, 2:] = False


def test_value_and_gradient():
    coarse = torch.tensor([[[0.2, 0.4], [0.9, 0.1]]], requires_grad=True)
    loss = CoarseRatioLoss(target_coarse_ratio=0.25, loss_weight=2)(coarse)
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert loss.item() == pytest.approx(2 * (0.4 - 0.25) ** 2)
    loss.backward()
    assert coarse.grad.flatten().tolist() == pytest.approx([2 * 2 * (0.4 - 0.25) / 4] * 4)


def test_padding_is_left_out():
    coarse = torch.tensor([[[0.2, float('nan')], [0.4, float('nan')]]], requires_grad=True)
    loss = CoarseRatioLoss(target_coarse_ratio=0.5)(coarse, torch.tensor([[[True, False]] * 2]))
    assert loss.item() == pytest.approx(0.2**2)
    loss.backward()
    assert coarse.grad.flatten().tolist() == pytest.approx([-0.2, 0, -0.2, 0])


@pytest.mark.parametrize('images', [0, 2])
def test_nothing_but_padding(images):
    coarse = torch.rand(images, 3, 4, requires_grad=True)
    loss = CoarseRatioLoss()(coarse, torch.zeros(images, 3, 4, dtype=torch.bool))
    loss.backward()
    assert loss == 0 and not coarse.grad.any()


def test_loss_stays_float32_under_autocast():
    coarse = torch.rand(2, 3, 4, requires_grad=True)
    plain = CoarseRatioLoss()(coarse)
    with torch.autocast('cpu', torch.bfloat16):
        loss = CoarseRatioLoss()(coarse)
    assert loss.dtype == torch.float32 and loss == plain
    assert CoarseRatioLoss()(coarse.bfloat16()).item() == pytest.approx(plain.item(), rel=0.1)


def test_warm_up():
    criterion = CoarseRatioLoss(loss_weight=3, warmup_iters=2)
    coarse = torch.ones(1, 2, 2, requires_grad=True)
    assert [criterion(coarse).item() / 0.25 for _ in range(4)] == [0, 1.5, 3, 3]
    assert list(criterion.state_dict()) == ['iterations'] and not CoarseRatioLoss().state_dict()


@pytest.mark.parametrize(
    'argument, value, allowed',
    [
        ('target_coarse_ratio', 0, 'above 0 and below 1'),
        ('target_coarse_ratio', 1, 'above 0 and below 1'),
        ('target_coarse_ratio', float('nan'), 'above 0 and below 1'),
        ('loss_weight', -1, '0 or more'),
        ('warmup_iters', -1, '0 or more'),
    ],
)
def test_bad_arguments(argument, value, allowed):
    with pytest.raises(ValueError, match=f'{argument} must be {allowed}, got {value}'):
        CoarseRatioLoss(**{argument: value})


def test_bad_input():
    coarse = torch.rand(2, 3, 4)
    with pytest.raises(ValueError, match=r'of shape \(B, Hr, Wr\), got torch.float32.*\(3, 4\)'):
        CoarseRatioLoss()(coarse[0])
    with pytest.raises(ValueError, match='must be floating point.*torch.bool'):
        CoarseRatioLoss()(coarse > 0.5)
    with pytest.raises(ValueError, match=r'\(2, 3, 4\), got torch.bool of shape \(3, 4\)'):
        CoarseRatioLoss()(coarse, coarse[0] > 0.5)
    with pytest.raises(ValueError, match='must be torch.bool .* got torch.float32'):
        CoarseRatioLoss()(coarse, coarse)


def test_built_from_a_config_of_any_library():
    built = MODELS.build(dict(type='mmtoken.CoarseRatioLoss', target_coarse_ratio=0.4))
    assert isinstance(built, CoarseRatioLoss) and built.target_coarse_ratio == 0.4


class Gated(nn.Module):
    """Chooses by weights and image."""

    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.7))
        self.offset = nn.Parameter(torch.tensor(-0.1))
        self.rate = CoarseRatioLoss(target_coarse_ratio=0.3, loss_weight=5)

    def forward(self, inputs, real):
        return self.rate((self.slope * inputs + self.offset).sigmoid(), real)


def loss_and_gradients(model, inputs, real):
    loss = model(inputs, real)
    loss.backward()
    return [loss.item(), *(p.grad.item() for p in model.parameters())]


def train_in_process(rank, folder):
    """One of two processes; the first has one image, the second two."""
    init = f'file://{folder}/init'
    dist.init_process_group('gloo', init_method=init, rank=rank, world_size=2)
    mine = slice(0, 1) if rank == 0 else slice(1, 3)
    model = DistributedDataParallel(Gated())
    np.save(folder / f'{rank}.npy', loss_and_gradients(model, INPUTS[mine], REAL[mine]))
    del model  # torch 2.13 may hang if DDP is the last that holds the group
    dist.destroy_process_group()


def test_two_processes_equal_one_with_the_whole_batch(tmp_path):
    # Processes that multiprocessing starts would not find the module that pytest made of this file.
    commands = [[sys.executable, __file__, str(rank), str(tmp_path)] for rank in (0, 1)]
    processes = [subprocess.Popen(command) for command in commands]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    expected = loss_and_gradients(Gated(), INPUTS, REAL)
    assert min(map(abs, expected)) > 1e-3
    for rank in (0, 1):
        assert np.load(tmp_path / f'{rank}.npy') == pytest.approx(expected, rel=1e-6)


if __name__ == '__main__':
    train_in_process(int(sys.argv[1]), Path(sys.argv[2]))
