import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from mmtoken.layers.common import routing
from mmtoken.layers.common.routing import (
    choose,
    explores,
    gumbel_noise,
    one_hot,
    rank_regions,
    spend_queries,
    straight_through,
    with_gradient_of,
)
from mmtoken.runtime.routing_override import RoutingOverride, routing_override

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


def test_regions_are_ranked():
    scores = torch.tensor([[3.0, 0.0], [1.0, 2.0], [0.0, 5.0], [9.0, 9.0]]).view(1, 2, 2, 2)
    assert rank_regions(scores, 0.5).tolist() == [[[0, 1], [1, 0]]]
    assert rank_regions(scores, 0.25).tolist() == [[[0, 1], [1, 1]]]
    padding = torch.tensor([[[True, False], [False, False]]])
    assert rank_regions(scores, 0.34, padding).tolist() == [[[1, 1], [1, 0]]]


@pytest.mark.parametrize('training', [False, True])
def test_a_ratio_leaves_nothing_to_chance(training):
    scores = torch.randn(2, 6, 7, 2, requires_grad=True)
    counts = torch.tensor([[4, 1]]).expand(42, 2)
    gates = choose(scores, counts, 'coarse_ratio', training, settled=rank_regions(scores, 0.3))
    assert torch.equal(gates.argmax(-1), rank_regions(scores, 0.3))
    assert gates.requires_grad == training
    if training:
        (gates[..., 0].sum()).backward()
        assert scores.grad.abs().sum() > 0


def serving(scores, choice):
    """Expected number of regions that a choice serves."""
    keeps = scores.softmax(-1).flip(-1).cumsum(-1).flip(-1)
    return keeps.gather(-1, choice[..., None]).sum()


@pytest.mark.parametrize('ratio', [0.1, 0.3, 0.55, 0.8])
def test_queries_are_spent_where_they_serve_most(ratio):
    """As well as any choice of six regions with as many queries."""
    torch.manual_seed(3)
    counts = torch.tensor([[16, 4, 1]] * 5 + [[8, 2, 1]])
    scores = 2 * torch.randn(1, 2, 3, 3)
    choice = spend_queries(scores, counts, ratio)
    spent = counts.gather(-1, choice.flatten()[:, None]).sum()
    assert spent <= ratio * counts[:, 0].sum()
    for other in itertools.product(range(3), repeat=6):
        other = torch.tensor(other).view(1, 2, 3)
        if counts.gather(-1, other.flatten()[:, None]).sum() <= spent:
            assert serving(scores, other) <= serving(scores, choice) + 1e-5


def test_least_and_most_queries():
    scores, counts = torch.randn(2, 3, 4, 3), torch.tensor([[16, 4, 1]] * 12)
    assert (spend_queries(scores, counts, 1.0) == 0).all()
    assert (spend_queries(scores, counts, 1 / 16) == 2).all()
    assert (spend_queries(scores, counts, 0.01) == 2).all()  # no choice is coarser


def test_two_choices_are_ranked():
    torch.manual_seed(0)
    scores, counts = torch.randn(3, 4, 5, 2), torch.tensor([[4, 1]] * 20)
    choice = spend_queries(scores, counts, (0.3 * 4 + 0.7) / 4)
    assert torch.equal(choice, rank_regions(scores, 0.3))
