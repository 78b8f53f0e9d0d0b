import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from mmtoken.losses import BatchShapingLoss, CoarseRatioLoss
from mmtoken.losses.batch_shaping import (
    PRIORS,
    batch_shaping,
    bin_grid,
    normal_cdf,
    relaxed_bernoulli_cdf,
)

DATA = Path(__file__).parent.parent / 'data'


@pytest.fixture(scope='module')
def golden():
    return {name: torch.from_numpy(v) for name, v in np.load(DATA / 'gbas_golden.npz').items()}


def close(actual, expected, tolerance=1e-9):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


# The released loss


def test_distances_of_positions(golden):
    gate, mu, tau = (golden[name].clone().requires_grad_() for name in ('gate', 'mu', 'tau'))
    position = torch.arange(6).expand(8, 6).flatten()
    probability = relaxed_bernoulli_cdf(gate, mu, tau)
    close(probability.sort(0).values, golden['prior_cdf_sorted'])
    distances, sizes = batch_shaping(probability.flatten(), position, 6)
    assert sizes.tolist() == [8] * 6
    close(distances, golden['prior_loss_per_position'])
    distances.mean().backward()
    for leaf, name in (gate, 'd_gate'), (mu, 'd_mu'), (tau, 'd_tau'):
        close(leaf.grad, golden[name])


def test_distance_of_means(golden):
    mu = golden['mu'].clone().requires_grad_()
    distance, _ = batch_shaping(normal_cdf(mu, 0.3, 0.1))
    close(distance[0], golden['hyper_normal_0.3_0.1'])
    distance.backward()
    close(mu.grad, golden['d_mu_hyper_normal'])


def test_distance_with_ties(golden):
    half = torch.tensor([0.3, 0.5], dtype=torch.float64)
    distance, _ = batch_shaping(relaxed_bernoulli_cdf(golden['ties_x'], *half))
    close(distance[0], golden['ties_loss_default'])


def test_whole_loss(golden):
    """Without pooling, on a grid of its own, the module is the released loss."""
    criterion = BatchShapingLoss(
        0.3, grid=(2, 3), min_samples=1, temperature_penalty=0.1, hyper_std=0.1
    ).double()
    mu, tau = golden['mu'].view(2, 3), golden['tau'].view(2, 3)
    criterion.load_state_dict(dict(mean_logits=mu.logit(), temperature_logits=tau.logit()))
    gate = golden['gate'].view(8, 2, 3).requires_grad_()
    loss = criterion(gate)
    assert loss.dtype == torch.float32 and loss.shape == ()
    parts = golden['prior_loss'], golden['hyper_normal_0.3_0.1'], 0.1 * golden['tau_l1']
    close(loss, sum(parts).float(), 1e-7)
    loss.backward()
    close(gate.grad.flatten(1), golden['d_gate'])
    d_mu = (golden['d_mu'] + golden['d_mu_hyper_normal']).view(2, 3)
    close(criterion.mean_logits.grad, d_mu * mu * (1 - mu))
    d_tau = (golden['d_tau'] + 0.1 / 6).view(2, 3)
    close(criterion.temperature_logits.grad, d_tau * tau * (1 - tau))


def test_plain_loss():
    """One prior for all positions, and no hyper-prior."""
    gate = torch.rand(8, 2, 3, dtype=torch.float64)
    criterion = BatchShapingLoss(0.3, generalised=False, temperature=0.6, min_samples=1)
    assert not list(criterion.parameters())
    prior = torch.tensor([0.3, 0.6], dtype=torch.float64)
    expected = [batch_shaping(relaxed_bernoulli_cdf(g, *prior))[0] for g in gate.flatten(1).T]
    close(criterion(gate), torch.cat(expected).mean().float(), 1e-7)


# Bins


@pytest.mark.parametrize(
    'batches, min_samples, expected',
    [
        ([(16, 14, 14)], 16, (14, 14)),
        ([(8, 14, 14)], 16, (7, 14)),
        ([(4, 14, 14)], 16, (7, 7)),
        ([(1, 14, 14)], 16, (3, 3)),
        ([(2, 25, 42)], 16, (8, 14)),
        ([(0.5, 8, 8)] * 2, 16, (2, 2)),
        ([(1, 8, 8), (1, 4, 16)], 8, (2, 8)),
        ([(1, 1, 40)], 16, (1, 2)),
        ([(8, 1, 1)], 16, (1, 1)),
        ([(0, 5, 5)], 1, (1, 1)),
        ([(1, 5, 3)], 1, (5, 3)),
    ],
)
def test_grid_of_bins(batches, min_samples, expected):
    assert bin_grid(batches, min_samples) == expected


sides = st.integers(1, 12)


@given(st.lists(st.tuples(st.integers(0, 4), sides, sides), min_size=1, max_size=3), sides)
@settings(deadline=None)
def test_bins_have_enough_samples(batches, min_samples):
    rows, columns = bin_grid(batches, min_samples)
    counts = np.zeros((rows, columns), int)
    for images, height, width in batches:
        assert rows <= height and columns <= width
        r, c = np.arange(height) * rows // height, np.arange(width) * columns // width
        np.add.at(counts, (r[:, None], c), images)
    assert counts.min() >= min_samples or (rows, columns) == (1, 1)


def slow_loss(criterion, images, shape):
    """The loss bin by bin, value by value; images are pairs of gate and mask, of any sizes."""
    means, temperatures = criterion.mean_logits.sigmoid(), criterion.temperature_logits.sigmoid()
    mean, temperature = (
        F.interpolate(p[None, None], shape, mode='bilinear', antialias=True)[0, 0]
        for p in (means, temperatures)
    )

    def distance(values, cdf):
        ordered = sorted(values, key=Tensor.item)
        terms = [(i / (len(values) + 1) - cdf(x)) ** 2 for i, x in enumerate(ordered, 1)]
        return sum(terms) / len(terms)

    distances = []
    for r, c in np.ndindex(*shape):
        values = []
        for gate, mask in images:
            (height, width) = gate.shape
            for i, j in np.ndindex(height, width):
                if (i * shape[0] // height, j * shape[1] // width) == (r, c) and mask[i, j]:
                    values.append(gate[i, j])
        if values:
            prior = mean[r, c], temperature[r, c]
            distances.append(distance(values, lambda x, p=prior: PRIORS[criterion.prior](x, *p)))
    if not distances:
        return torch.zeros(())
    hyper = distance(
        list(means.flatten()),
        lambda x: normal_cdf(x, criterion.target_coarse_ratio, criterion.hyper_std),
    )
    penalty = criterion.temperature_penalty * temperatures.mean()
    return criterion.loss_weight * (sum(distances) / len(distances) + hyper + penalty)


def gradients(loss, *leaves):
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]


@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 7), st.integers(1, 7)),
    grid=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    min_samples=st.integers(1, 20),
    prior=st.sampled_from(list(PRIORS)),
    padding=st.sampled_from([0, 0.3, 0.9]),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=60)
def test_equals_the_slow_loss(shape, grid, min_samples, prior, padding, seed):
    torch.manual_seed(seed)
    criterion = BatchShapingLoss(
        0.4, loss_weight=3, prior=prior, grid=grid, min_samples=min_samples, temperature=0.6
    ).double()
    for parameter in criterion.parameters():
        nn.init.normal_(parameter)
    coarse = torch.rand(shape, dtype=torch.float64, requires_grad=True)
    real = torch.rand(shape) >= padding
    share = real.sum().item() / (shape[1] * shape[2])
    bins = bin_grid([(share, *shape[1:])], min_samples)
    leaves = coarse, *criterion.parameters()
    loss = criterion(coarse, real)
    expected = slow_loss(criterion, list(zip(coarse, real, strict=True)), bins)
    close(loss, expected.float(), 1e-6)
    if real.any():
        for one, other in zip(gradients(loss, *leaves), gradients(expected, *leaves), strict=True):
            close(one, other)


def test_order_of_images_does_not_matter():
    torch.manual_seed(0)
    criterion = BatchShapingLoss(grid=(3, 3))
    coarse, real = torch.rand(4, 6, 5, requires_grad=True), torch.rand(4, 6, 5) > 0.2
    order = torch.tensor([2, 0, 3, 1])
    loss, permuted = criterion(coarse, real), criterion(coarse[order], real[order])
    close(loss, permuted, 1e-7)
    close(*(gradients(x, coarse)[0] for x in (loss, permuted)), 1e-7)


def test_nan_in_padding_does_no_harm():
    torch.manual_seed(0)
    criterion = BatchShapingLoss()
    coarse, real = torch.rand(2, 6, 5), torch.ones(2, 6, 5, dtype=torch.bool)
    real[1, 3:] = False
    broken = coarse.masked_fill(~real, float('nan')).requires_grad_()
    loss = criterion(broken, real)
    assert loss == criterion(coarse, real)
    loss.backward()
    assert torch.equal(broken.grad != 0, real)


@pytest.mark.parametrize('images', [0, 2])
def test_nothing_but_padding(images):
    criterion = BatchShapingLoss()
    coarse = torch.rand(images, 3, 4, requires_grad=True)
    loss = criterion(coarse, torch.zeros(images, 3, 4, dtype=torch.bool))
    loss.backward()
    assert loss == 0 and not coarse.grad.any()
    assert all(not p.grad.any() for p in criterion.parameters())


# The learned priors


def test_priors_start_at_the_target():
    criterion = BatchShapingLoss(0.2, temperature=0.3)
    means, temperatures = criterion.mean_logits.sigmoid(), criterion.temperature_logits.sigmoid()
    assert means.shape == temperatures.shape == (7, 7)
    assert (means - 0.2).abs().max() < 0.01 and means.std() > 0
    close(temperatures, torch.full((7, 7), 0.3), 1e-6)


@pytest.mark.parametrize('prior', PRIORS)
@pytest.mark.parametrize('shape', [(1, 2, 2), (2, 9, 13), (16, 7, 7), (16, 14, 14)])
def test_gradients_reach_every_parameter(prior, shape):
    """Also of a grid that is coarser than theirs."""
    torch.manual_seed(0)
    criterion = BatchShapingLoss(prior=prior, temperature_penalty=0, hyper_std=1e6)
    criterion(torch.rand(shape)).backward()
    for parameter in criterion.parameters():
        assert parameter.grad.all()


def test_temperatures_of_normal_priors_have_no_penalty():
    torch.manual_seed(0)
    coarse = torch.rand(2, 6, 6)
    losses = []
    for penalty in (0, 5):
        torch.manual_seed(1)
        losses.append(BatchShapingLoss(prior='normal', temperature_penalty=penalty)(coarse))
    assert losses[0] == losses[1]


def test_loss_is_float32_under_autocast():
    torch.manual_seed(0)
    criterion = BatchShapingLoss(warmup_iters=2)
    criterion.iterations += 2
    coarse = torch.rand(2, 6, 6, requires_grad=True)
    plain = criterion(coarse)
    with torch.autocast('cpu', torch.bfloat16):
        loss = criterion(coarse)
        half = criterion(coarse.bfloat16())
    assert loss.dtype == half.dtype == torch.float32
    assert loss == plain and half.item() == pytest.approx(plain.item(), rel=0.05)
    half.backward()
    assert coarse.grad.isfinite().all()


def test_warm_up():
    criterion = BatchShapingLoss(loss_weight=3, warmup_iters=2)
    coarse = torch.rand(2, 6, 6, requires_grad=True)
    with torch.no_grad():
        assert criterion(coarse) == 0
    criterion.eval()(coarse)
    assert criterion.train().iterations == 0
    losses = []
    for _ in range(4):
        losses.append(checkpoint(criterion, coarse, use_reentrant=False))
        losses[-1].backward()
    assert criterion.iterations == 4
    assert [(x / losses[-1]).item() for x in losses] == pytest.approx([0, 0.5, 1, 1])
    resumed = BatchShapingLoss(warmup_iters=2)
    resumed.load_state_dict(criterion.state_dict())
    assert resumed.iterations == 4 and torch.equal(resumed.mean_logits, criterion.mean_logits)
    assert not BatchShapingLoss(generalised=False).state_dict()


# What the loss does


def descend(criterion, steps=400):
    """Train free gates of 64 images, which are nearly the same at first; gates and means."""
    torch.manual_seed(0)
    logits = nn.Parameter(0.05 * torch.randn(64, 4, 4))
    optimizer = torch.optim.Adam([logits, *criterion.parameters()], lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        criterion(logits.sigmoid()).backward()
        optimizer.step()
    return logits.sigmoid().detach()


@pytest.mark.parametrize('target', [0.25, 0.5])
@pytest.mark.parametrize('generalised', [True, False])
def test_gates_learn_to_vary(target, generalised):
    torch.manual_seed(0)
    gates = descend(BatchShapingLoss(target, generalised=generalised, grid=(4, 4)))
    assert (gates > 0.5).float().mean().item() == pytest.approx(target, abs=0.05)
    assert gates.mean().item() == pytest.approx(target, abs=0.05)
    assert gates.std(0).min() > 0.2  # over images, at every position
    assert ((gates < 0.2) | (gates > 0.8)).float().mean() > 0.6


def test_a_rate_alone_lets_gates_be_constant():
    gates = descend(CoarseRatioLoss(0.25))
    assert gates.mean().item() == pytest.approx(0.25, abs=0.01)
    assert gates.std(0).max() < 0.02


# Errors


@pytest.mark.parametrize(
    'argument, value, allowed',
    [
        ('target_coarse_ratio', 0, 'above 0 and below 1'),
        ('target_coarse_ratio', float('nan'), 'above 0 and below 1'),
        ('loss_weight', -1, '0 or more'),
        ('prior', 'beta', 'one of relaxed_bernoulli, normal'),
        ('temperature', 1, 'above 0 and below 1'),
        ('temperature_penalty', -0.1, '0 or more'),
        ('hyper_std', 0, 'above 0'),
        ('grid', (0, 7), 'two numbers of 1 or more'),
        ('grid', (7,), 'two numbers of 1 or more'),
        ('min_samples', 0, '1 or more'),
        ('warmup_iters', -1, '0 or more'),
    ],
)
def test_bad_arguments(argument, value, allowed):
    with pytest.raises(ValueError) as error:
        BatchShapingLoss(**{argument: value})
    assert str(error.value) == f'{argument} must be {allowed}, got {value!r}'


def test_bad_input():
    with pytest.raises(ValueError, match='coarse must be'):
        BatchShapingLoss()(torch.rand(3, 4))
    with pytest.raises(ValueError, match='valid_mask must be'):
        BatchShapingLoss()(torch.rand(2, 3, 4), torch.ones(2, 3, 4))


def test_built_from_a_config_of_any_library():
    config = dict(type='mmtoken.BatchShapingLoss', target_coarse_ratio=0.4, grid=[3, 5])
    built = MODELS.build(config)
    assert isinstance(built, BatchShapingLoss) and built.mean_logits.shape == (3, 5)


# Several processes


class Gated(nn.Module):
    """Chooses by weights and image."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.slope = nn.Parameter(torch.tensor(3.0))
        self.offset = nn.Parameter(torch.tensor(-1.0))
        self.shaping = BatchShapingLoss(0.3, loss_weight=5, grid=(3, 2), min_samples=6)
        self.double()

    def gate(self, inputs):
        return (self.slope * inputs + self.offset).sigmoid()

    def forward(self, inputs, real):
        return self.shaping(self.gate(inputs), real)

    def backward(self, loss):
        loss.backward()
        return [loss.item(), *torch.cat([p.grad.flatten() for p in self.parameters()]).tolist()]


def batches(case):
    """What each of two processes has: images and masks."""
    torch.manual_seed(1)
    shapes = [(1, 4, 6), (3, 4, 6)] if case == 'images' else [(1, 7, 6), (2, 4, 9)]
    inputs = [torch.rand(shape, dtype=torch.float64) for shape in shapes]
    real = [torch.rand(shape) > 0.2 for shape in shapes]
    if case == 'padding':
        real[0][:] = False
    return list(zip(inputs, real, strict=True))


CASES = ['images', 'sizes', 'padding']


def train_in_process(rank, folder):
    """One of two processes."""
    init = f'file://{folder}/init'
    dist.init_process_group('gloo', init_method=init, rank=rank, world_size=2)
    for case in CASES:
        model = DistributedDataParallel(Gated())
        loss = model(*batches(case)[rank])
        np.save(folder / f'{case}_{rank}.npy', model.module.backward(loss))
    del model  # torch 2.13 may hang if DDP is the last that holds the group
    dist.destroy_process_group()


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    # Processes that multiprocessing starts would not find the module that pytest made of this file.
    folder = tmp_path_factory.mktemp('processes')
    commands = [[sys.executable, __file__, str(rank), str(folder)] for rank in (0, 1)]
    processes = [subprocess.Popen(command) for command in commands]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    return folder


@pytest.mark.parametrize('case', CASES)
def test_two_processes_equal_one_with_the_whole_batch(trained, case):
    model = Gated()
    ranks = batches(case)
    if case == 'images':  # of one size
        loss = model(*(torch.cat(tensors) for tensors in zip(*ranks, strict=True)))
    else:
        images = [(model.gate(x), mask) for rank in ranks for x, mask in zip(*rank, strict=True)]
        grids = [(mask.sum().item() / mask[0].numel(), *mask.shape[1:]) for _, mask in ranks]
        bins = bin_grid(grids, 6)
        assert min(bins) > 1
        loss = slow_loss(model.shaping, images, bins)
    expected = model.backward(loss)
    assert min(map(abs, expected)) > 1e-5
    for rank in (0, 1):
        assert np.load(trained / f'{case}_{rank}.npy') == pytest.approx(expected, rel=1e-6)


if __name__ == '__main__':
    train_in_process(int(sys.argv[1]), Path(sys.argv[2]))
