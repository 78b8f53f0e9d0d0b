import math
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtoken.layers.common import routing
from mmtoken.layers.common.regions import make_region_layout
from mmtoken.layers.common.routing import (
    RoutingOverride,
    choose,
    current_override,
    explores,
    gumbel_noise,
    one_hot,
    routing_override,
    straight_through,
    with_gradient_of,
)
from mmtoken.layers.dge.block import DynamicGranularityBlock
from mmtoken.layers.dge.spatial_reduction import SpatialReductionAttention

DATA = Path(__file__).parents[2] / 'data'


@pytest.mark.parametrize('scale', [1e-3, 1, 100])
def test_choices_are_hard_and_learn_as_if_soft(scale):
    scores = (scale * torch.randn(500, 3)).requires_grad_()
    weights = torch.randn(500, 3)
    hard, soft = straight_through(scores), scores.softmax(dim=-1)
    assert torch.equal(hard.detach(), one_hot(scores.argmax(-1), scores))
    grads = [torch.autograd.grad((g * weights).sum(), scores)[0] for g in (hard, soft)]
    torch.testing.assert_close(*grads, atol=0, rtol=0)
    assert grads[0].abs().sum() > 0


def test_gradients_are_borrowed_and_values_are_not():
    value = torch.tensor([1e8, 0.1, -1e-30, 0.0])
    other = torch.tensor([0.3, 1e8, 1.0, -7.7], requires_grad=True)
    out = with_gradient_of(value, other)
    assert torch.equal(out.detach(), value)
    out.backward(value)
    assert torch.equal(other.grad, value)


def test_one_hot_is_like_what_it_is_for():
    like = torch.zeros(2, 3, 4, dtype=torch.bfloat16)
    hot = one_hot(torch.tensor([[0, 3, 1], [2, 2, 0]]), like)
    assert hot.dtype == torch.bfloat16
    assert hot.argmax(-1).tolist() == [[0, 3, 1], [2, 2, 0]] and hot.sum() == 6


def test_noise_is_of_the_standard_gumbel_distribution():
    noise = gumbel_noise(torch.empty(200_000))
    assert noise.isfinite().all()
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.01)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.03)
    for q in (0.1, 0.5, 0.9):
        assert noise.quantile(q).item() == pytest.approx(-math.log(-math.log(q)), abs=0.02)


def test_only_what_can_learn_explores():
    """Not a teacher, which is fixed but in training mode with its student."""
    router, x = torch.nn.Linear(2, 3), torch.ones(1, 2)
    assert explores(router, x)
    with torch.no_grad():  # as in the first pass of a reentrant checkpoint
        assert explores(router, x)
    assert not explores(router.eval(), x)
    router.train().requires_grad_(False)
    assert not explores(router, x)
    assert explores(router, x.requires_grad_())  # what lies before it may learn


def test_noisy_scores_sample_from_their_softmax():
    scores = torch.tensor([1.0, 0.0, -1.0]).expand(100_000, 3)
    frequencies = straight_through(scores + gumbel_noise(scores)).mean(dim=0)
    torch.testing.assert_close(frequencies, scores[0].softmax(0), atol=0.006, rtol=0)


def test_noise_comes_from_the_seed():
    scores = torch.zeros(4, 5, dtype=torch.float64)
    noises = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        noises.append(gumbel_noise(scores))
    assert noises[0].dtype == torch.float64 and noises[0].shape == (4, 5)
    assert torch.equal(noises[0], noises[1]) and not torch.equal(noises[0], noises[2])


def drawn(counts, ratio, seed, batch=1):
    choice = RoutingOverride('query_ratio', (ratio,), seed).draw(counts, batch)
    assert choice.shape == (batch, len(counts)) and choice.dtype == torch.long
    totals = counts.expand(batch, -1, -1).gather(2, choice[..., None]).sum((1, 2))
    return choice, totals.double()


@pytest.mark.parametrize('kinds', [(4, 1), (16, 1), (16, 4)])
@pytest.mark.parametrize('num_regions', [1, 2, 3, 4, 6, 9])
def test_count_is_the_nearest_there_is(kinds, num_regions):
    counts, possible = torch.tensor([kinds] * num_regions), {0}
    for _ in range(num_regions):
        possible = {t + kind for t, kind in product(possible, kinds)}
    for ratio in torch.linspace(0.02, 1, 33).tolist():
        _, (total,) = drawn(counts, ratio, seed=0)
        target = ratio * num_regions * kinds[0]
        assert abs(total - target) <= min(abs(t - target) for t in possible) + 1e-6, ratio


@pytest.mark.parametrize('ratio', [0.07, 0.2, 0.43, 0.5, 0.77, 1.0])
@pytest.mark.parametrize('grid', [(64, 64), (16, 24), (200, 320)])
def test_count_of_large_grids_is_met(grid, ratio):
    counts = make_region_layout(grid, (1, 2, 4), 4).num_cells
    choice, totals = drawn(counts, ratio, seed=1, batch=2)
    # All totals are as many as the regions, and some threes more.
    assert ((totals - ratio * counts[:, 0].sum()).abs() <= 1.5).all()
    if 0.2 <= ratio < 0.8:
        assert set(choice[0].tolist()) == {0, 1, 2}


@settings(max_examples=50, deadline=None)
@given(
    grid=st.tuples(st.integers(1, 13), st.integers(1, 13)),
    ratio=st.floats(0.01, 1),
    seed=st.integers(0, 99),
)
def test_no_single_change_would_be_nearer(grid, ratio, seed):
    """With any borders."""
    counts = make_region_layout(grid, (1, 2, 4), 4).num_cells
    ((choice,), (total,)) = drawn(counts, ratio, seed)
    now = counts.gather(1, choice[:, None])
    target = ratio * counts[:, 0].sum().item()
    errors = (total + counts - now - target).abs()
    assert abs(total - target) <= errors.min() + 1e-6


def test_layouts_differ_by_image_block_and_seed_alone():
    counts = make_region_layout((32, 32), (1, 2, 4), 4).num_cells
    first, again, other = (RoutingOverride('query_ratio', (0.5,), seed) for seed in (0, 0, 1))
    draws = [(o.draw(counts, 2), o.draw(counts, 2)) for o in (first, again, other)]
    for a, b in zip(draws[0], draws[1], strict=True):
        assert torch.equal(a, b)
    layouts = {tuple(image.tolist()) for pair in (draws[0], draws[2]) for d in pair for image in d}
    assert len(layouts) == 8


def drawn_coarse(ratios, num_regions, batch=1, seed=0):
    counts = torch.tensor([[4, 1]] * num_regions)
    return RoutingOverride('coarse_ratio', ratios, seed).draw(counts, batch)


@pytest.mark.parametrize('num_regions', [1, 2, 7, 49, 100])
def test_coarse_regions_are_as_many_as_asked_for(num_regions):
    for ratio in torch.linspace(0, 1, 21).tolist():
        choice = drawn_coarse((ratio,), num_regions, batch=3)
        assert choice.shape == (3, num_regions) and choice.dtype == torch.long
        assert choice.sum(dim=1).tolist() == [round(ratio * num_regions)] * 3


def test_coarse_regions_are_the_last_choice_and_anywhere():
    counts = torch.tensor([[16, 4, 1]] * 20)
    choice = RoutingOverride('coarse_ratio', (0.3,), 0).draw(counts, 600)
    assert set(choice.flatten().tolist()) == {0, 2}
    assert ((choice == 2).sum(dim=1) == 6).all()
    share = (choice == 2).double().mean(dim=0)
    assert share.min() > 0.2 and share.max() < 0.4
    assert torch.equal(drawn_coarse((0.5,), 30, 4, seed=3), drawn_coarse((0.5,), 30, 4, seed=3))
    assert not torch.equal(drawn_coarse((0.5,), 30, seed=3), drawn_coarse((0.5,), 30, seed=4))


def test_images_have_ratios_in_turn():
    choice = drawn_coarse((0.1, 0.5, 1), 10, batch=5)
    assert choice.sum(dim=1).tolist() == [1, 5, 10, 1, 5]
    assert drawn_coarse((0.1, 0.5, 1), 10, batch=2).sum(dim=1).tolist() == [1, 5]
    counts = make_region_layout((32, 32), (1, 2, 4), 4).num_cells
    choice = RoutingOverride('query_ratio', (0.25, 1), 0).draw(counts, 3)
    totals = counts.expand(3, -1, -1).gather(2, choice[..., None]).sum((1, 2))
    assert totals.tolist() == [256, 1024, 256]
    with routing_override(coarse_ratio=[0, 0.5]):
        assert current_override('coarse_ratio').ratios == (0, 0.5)


def test_every_region_has_the_same_chances():
    counts = make_region_layout((12, 12), (1, 2, 4), 4).num_cells
    choice, _ = drawn(counts, 0.45, seed=0, batch=800)
    for k in range(3):
        share = (choice == k).double().mean(dim=0)
        assert share.max() - share.min() < 0.12


def test_overrides_nest_and_end():
    assert current_override('query_ratio') is None
    with routing_override(query_ratio=0.5):
        outer = current_override('query_ratio')
        with pytest.raises(KeyError), routing_override(coarse_ratio=0, seed=3):
            assert current_override('coarse_ratio').ratios == (0,)
            raise KeyError
        assert current_override('query_ratio') is outer and outer.ratios == (0.5,)
    assert current_override('query_ratio') is None


@pytest.mark.parametrize(
    'ratios, message',
    [
        ({}, 'got neither'),
        (dict(query_ratio=0.5, coarse_ratio=0.5), 'got query_ratio and coarse_ratio'),
        (dict(query_ratio=0), r'query_ratio must be in \(0, 1\], got 0'),
        (dict(query_ratio=1.01), r'query_ratio must be in \(0, 1\], got 1.01'),
        (dict(coarse_ratio=-0.1), r'coarse_ratio must be in \[0, 1\], got -0.1'),
        (dict(coarse_ratio=2), r'coarse_ratio must be in \[0, 1\], got 2'),
        (dict(query_ratio=float('nan')), 'got nan'),
        (dict(query_ratio=(0.5, 0)), r'query_ratio must be in \(0, 1\], got \(0.5, 0\)'),
        (dict(coarse_ratio=[0, 1.5]), r'coarse_ratio must be in \[0, 1\], got \[0, 1.5\]'),
        (dict(coarse_ratio=()), r'got \(\)'),
    ],
)
def test_bad_ratios(ratios, message):
    with pytest.raises(ValueError, match=message), routing_override(**ratios):
        pass
    assert current_override('query_ratio') is None


def make_block(**kwargs):
    return DynamicGranularityBlock(16, SpatialReductionAttention(16, 2, 2), 32, **kwargs)


def test_wrong_kind_of_ratio():
    with (
        routing_override(coarse_ratio=0.5),
        pytest.raises(ValueError, match=r'coarse_ratio=.* but this network has a query_ratio'),
    ):
        make_block()(torch.randn(1, 64, 16), (8, 8))


@pytest.mark.parametrize('granularities', [(1, 2, 4), (1, 2)])
@pytest.mark.parametrize('train_mode', ['exact', 'dense', 'sparse'])
def test_overridden_training(granularities, train_mode):
    """The layout is given, all else is as ever: same values, and gradients for the router."""
    block = make_block(granularities=granularities, train_mode=train_mode)
    x = torch.randn(2, 16 * 12, 16)
    with torch.no_grad(), routing_override(query_ratio=0.5, seed=5):
        expected, used = block.eval()(x, (16, 12))
    state = torch.get_rng_state()
    with routing_override(query_ratio=0.5, seed=5):
        out, usage = block.train()(x, (16, 12))
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(out, expected)
    assert usage.queries.tolist() == used.queries.tolist() == [96, 96]
    weight = block.router.gate.weight
    for loss in (out.square().sum(), usage.dynamic.sum()):
        (grad,) = torch.autograd.grad(loss, weight, retain_graph=True)
        assert grad.abs().sum() > 0


# Choices of all regions

COUNTS = torch.tensor([[4, 1]] * 12)


def choose_scales(scores, training=True, **kwargs):
    return choose(scores, COUNTS, 'coarse_ratio', training, **kwargs)


@pytest.mark.parametrize('temperature', [1.0, 0.5])
def test_golden_samples(temperature, monkeypatch):
    """The Gumbel-softmax of two scales is the sigmoid of logits with logistic noise."""
    golden = {name: torch.from_numpy(v) for name, v in np.load(DATA / 'gbas_golden.npz').items()}
    logits = golden['gsig_logits'].requires_grad_()
    noise = golden['gsig_u'].logit()
    scores = torch.stack([torch.zeros_like(logits), logits], dim=-1)[:, None]
    both = torch.stack([torch.zeros_like(noise), noise], dim=-1)[:, None]
    monkeypatch.setattr(routing, 'gumbel_noise', lambda scores: both)
    gates = choose_scales(scores, temperature=temperature)[:, 0]
    assert torch.equal(gates[..., 1], golden['gsig_hard_T1'].double())
    assert torch.equal(gates.sum(dim=-1), torch.ones_like(noise))
    # In its gradient the sigmoid shows itself.
    soft = golden[f'gsig_T{temperature}']
    weights = torch.randn_like(soft)
    (grad,) = torch.autograd.grad((gates[..., 1] * weights).sum(), logits)
    expected = weights * soft * (1 - soft) / temperature
    torch.testing.assert_close(grad, expected, atol=1e-10, rtol=0)


def test_difference_of_noise_is_logistic():
    scores = torch.zeros(200_000, 2)
    noise = gumbel_noise(scores)
    difference = noise[:, 1] - noise[:, 0]
    for q in (0.05, 0.3, 0.5, 0.9):
        expected = math.log(q / (1 - q))
        assert difference.quantile(q).item() == pytest.approx(expected, abs=0.03)


def test_choices_outside_of_training():
    scores = torch.randn(2, 3, 4, 2, requires_grad=True)
    state = torch.get_rng_state()
    gates = choose_scales(scores, training=False)
    assert torch.equal(gates, one_hot(scores.argmax(-1), scores))
    assert not gates.requires_grad and torch.equal(torch.get_rng_state(), state)


def test_temperature_does_not_change_choices():
    scores, gates, grads = torch.randn(2, 3, 4, 2, requires_grad=True), [], []
    for temperature in (0.1, 1, 7):
        torch.manual_seed(3)
        gates.append(choose_scales(scores, temperature=temperature))
        grads.append(torch.autograd.grad(gates[-1][..., 0].sum(), scores)[0])
    assert torch.equal(gates[0], gates[1]) and torch.equal(gates[0], gates[2])
    assert not torch.allclose(grads[0], grads[1]) and not torch.allclose(grads[1], grads[2])


@pytest.mark.parametrize('training', [True, False])
def test_padding_is_as_coarse_as_can_be(training):
    scores = torch.randn(2, 3, 4, 2, requires_grad=True)
    padding = torch.rand(2, 3, 4) < 0.4
    for ratio in (None, 0):
        torch.manual_seed(3)
        if ratio is None:
            gates = choose_scales(scores, training, padding=padding)
            torch.manual_seed(3)
            expected = choose_scales(scores, training).argmax(-1)
        else:
            with routing_override(coarse_ratio=ratio):
                gates = choose_scales(scores, training, padding=padding)
            expected = torch.zeros(2, 3, 4, dtype=torch.long)
        assert torch.equal(gates.argmax(-1), torch.where(padding, 1, expected))
        assert ((gates == 0) | (gates == 1)).all()
        if training:
            (grad,) = torch.autograd.grad((gates * torch.randn_like(gates)).sum(), scores)
            assert torch.equal(grad.abs().sum(-1) == 0, padding)


@pytest.mark.parametrize('training', [True, False])
def test_override_replaces_the_choice_alone(training):
    scores, weights = torch.randn(2, 3, 4, 2, requires_grad=True), torch.randn(2, 3, 4, 2)
    with routing_override(coarse_ratio=(0.25, 1), seed=5):
        gates = choose_scales(scores, training, temperature=0.3)
    expected = RoutingOverride('coarse_ratio', (0.25, 1), 5).draw(COUNTS, 2).view(2, 3, 4)
    assert torch.equal(gates.argmax(-1), expected)
    assert gates[..., 1].sum((1, 2)).tolist() == [3, 12]
    assert gates.requires_grad == training
    if training:
        grads = [
            torch.autograd.grad((g * weights).sum(), scores)[0] for g in (gates, scores.softmax(-1))
        ]
        assert torch.equal(*grads)


def test_choice_under_the_wrong_override():
    with (
        routing_override(query_ratio=0.5),
        pytest.raises(ValueError, match=r'query_ratio=.* but this network has a coarse_ratio'),
    ):
        choose_scales(torch.randn(2, 3, 4, 2))
