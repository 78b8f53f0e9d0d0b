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
from torch.utils.checkpoint import checkpoint

from mmtoken.losses import BudgetLoss
from mmtoken.losses.budget import BlockWidths, block_complexity

STATIC = torch.tensor([100.0, 300.0, 50.0, 150.0, 400.0], dtype=torch.float64)
INPUTS = torch.arange(10, dtype=torch.float32).view(5, 2) / 10


def test_value_and_gradient():
    dynamic = torch.tensor([60.0, 60.0], dtype=torch.float64, requires_grad=True)
    loss, ratio = BudgetLoss(target=0.25, loss_weight=2)(STATIC[:2], dynamic)
    assert ratio == 120 / 400 and not ratio.requires_grad
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert loss.item() == pytest.approx(2 * (0.3 - 0.25) ** 2)
    loss.backward()
    assert dynamic.grad.tolist() == pytest.approx([2 * 2 * (0.3 - 0.25) / 400] * 2)


def test_sums_are_exact_beyond_float32():
    static = torch.full((2,), 1e12, dtype=torch.float64)
    loss, ratio = BudgetLoss(target=0.5)(static, static / 2 + 1)
    assert ratio.item() == 0.5 + 1e-12
    assert loss.item() == pytest.approx(1e-24, rel=1e-3, abs=0)


def test_nothing_to_count():
    nothing = torch.zeros(0, dtype=torch.float64)
    loss, ratio = BudgetLoss()(nothing, nothing)
    assert ratio == 0 and loss == 0.25


def test_loss_stays_float32_under_autocast():
    dynamic = torch.tensor([60.1], dtype=torch.float64, requires_grad=True)
    criterion = BudgetLoss(warmup_iters=2)
    criterion.iterations += 2
    plain, _ = criterion(STATIC[:1], dynamic)
    with torch.autocast('cpu', torch.bfloat16):
        loss, ratio = criterion(STATIC[:1], dynamic)
    assert loss.dtype == torch.float32 and ratio.dtype == torch.float64
    assert loss == plain


def test_warm_up():
    criterion = BudgetLoss(target=0.5, loss_weight=3, warmup_iters=4)
    full = STATIC.clone().requires_grad_()
    with torch.no_grad():
        assert criterion(STATIC, full)[0] == 0
    criterion.eval()(STATIC, full)
    assert criterion.train().iterations == 0  # neither of the two was training
    losses = [criterion(STATIC, full)[0] for _ in range(6)]
    assert [loss.item() / 0.25 for loss in losses] == [0, 0.75, 1.5, 2.25, 3, 3]
    losses[1].backward()  # counting on has not changed what the graph holds
    assert full.grad[0].item() == pytest.approx(0.75 * 2 * 0.5 / 1000)
    resumed = BudgetLoss(loss_weight=3, warmup_iters=4)
    resumed.load_state_dict(criterion.state_dict())
    assert resumed.iterations == 6


def test_recomputation_is_not_counted():
    criterion = BudgetLoss(warmup_iters=4)
    full = STATIC.clone().requires_grad_()
    for _ in range(3):
        loss, _ = checkpoint(criterion, STATIC, full, use_reentrant=False)
        loss.backward()
    assert criterion.iterations == 3


def test_no_counter_without_warm_up():
    assert not BudgetLoss().state_dict()


@pytest.mark.parametrize(
    'argument, value, allowed',
    [
        ('target', 0, 'above 0 and at most 1'),
        ('target', 1.5, 'above 0 and at most 1'),
        ('target', float('nan'), 'above 0 and at most 1'),
        ('loss_weight', -1, '0 or more'),
        ('warmup_iters', -1, '0 or more'),
        ('num_classes', -5, '0 or more'),
    ],
)
def test_bad_arguments(argument, value, allowed):
    with pytest.raises(ValueError, match=f'{argument} must be {allowed}, got {value}'):
        BudgetLoss(**{argument: value})


def test_unequal_shapes():
    with pytest.raises(ValueError, match=r'\(5,\) and \(2,\)'):
        BudgetLoss()(STATIC, STATIC[:2])


def test_built_from_a_config_of_any_library():
    built = MODELS.build(dict(type='mmtoken.BudgetLoss', target=0.4, num_classes=1000, legacy=True))
    assert isinstance(built, BudgetLoss)
    assert built.target == 0.4 and built.num_classes == 1000 and built.legacy


TEN = torch.tensor([10.0])
ZERO = torch.tensor([0.0])


@pytest.mark.parametrize('sr_ratio', [1, 2])
def test_products_are_counted_once_or_twice(sr_ratio):
    once, twice = (BlockWidths(16, 24, 2, sr_ratio=sr_ratio, attn_products=n) for n in (1, 2))
    tokens, queries = torch.tensor([64.0, 64.0]), torch.tensor([64.0, 10.0])
    more = block_complexity(twice, tokens, queries) - block_complexity(once, tokens, queries)
    assert torch.equal(more, queries * tokens / sr_ratio**2 * 16)


def test_complexity_of_deformable_attention_is_that_of_its_parts():
    widths = BlockWidths(8, 24, 2, num_points=3)
    values, router = 10 * 8 * 8, 10 / 16 * 8 * 4
    assert block_complexity(widths, TEN, ZERO).item() == 2 * 10 * 8 + values + router
    projections, mlp = 8 * 8 + 8 * (2 * 3 * 2) + 8 * (2 * 3), 2 * 8 * 24 + 24
    assert block_complexity(widths, ZERO, TEN).item() == 10 * (projections + 5 * 8 * 3 + mlp)


class Routed(nn.Module):
    """Uses a share of the cost that depends on its weights and on the image."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(2, 1)
        nn.init.constant_(self.router.weight, 0.7)
        nn.init.constant_(self.router.bias, -0.1)
        self.budget = BudgetLoss(target=0.3, loss_weight=5)

    def forward(self, static, inputs):
        return self.budget(static, static * self.router(inputs)[:, 0].sigmoid().double())


def train_in_process(rank, folder):
    """One of two processes; the first has two images, the second three."""
    init = f'file://{folder}/init'
    dist.init_process_group('gloo', init_method=init, rank=rank, world_size=2)
    mine = slice(0, 2) if rank == 0 else slice(2, 5)
    model = DistributedDataParallel(Routed())
    loss, ratio = model(STATIC[mine], INPUTS[mine])
    loss.backward()
    router = model.module.router
    values = (loss, ratio, *router.weight.grad[0], router.bias.grad)
    np.save(folder / f'{rank}.npy', [value.item() for value in values])
    del model  # torch 2.13 may hang if DDP is the last that holds the group
    dist.destroy_process_group()


def test_two_processes_equal_one_with_the_whole_batch(tmp_path):
    # Processes that multiprocessing starts would not find the module that pytest made of this file.
    commands = [[sys.executable, __file__, str(rank), str(tmp_path)] for rank in (0, 1)]
    processes = [subprocess.Popen(command) for command in commands]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    model = Routed()
    loss, ratio = model(STATIC, INPUTS)
    loss.backward()
    expected = [loss.item(), ratio.item(), *model.router.weight.grad[0].tolist()]
    expected.append(model.router.bias.grad.item())
    assert min(map(abs, expected)) > 1e-3
    for rank in (0, 1):
        assert np.load(tmp_path / f'{rank}.npy') == pytest.approx(expected, rel=1e-6)


if __name__ == '__main__':
    train_in_process(int(sys.argv[1]), Path(sys.argv[2]))
