from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mmtoken
from mmtoken.backbones import DGEPVT
from mmtoken.layers.common.regions import make_region_layout
from mmtoken.runtime.routing_override import (
    RoutingOverride,
    current_override,
    replayed_routing,
    routing_override,
)


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


ARCH = dict(
    embed_dims=(16, 32), depths=(1, 1), num_heads=(1, 2), mlp_ratios=(2, 2), sr_ratios=(2, 1)
)


@pytest.mark.parametrize('granularities', [(1, 2, 4), (1, 2)])
@pytest.mark.parametrize('train_mode', ['exact', 'dense', 'sparse'])
def test_training_takes_the_same_path(granularities, train_mode):
    """With the same layouts outputs are those of inference, and routers get their gradients."""
    model = DGEPVT(
        ARCH, granularities, train_mode=train_mode, out_indices=(0, 1), drop_path_rate=0.0
    )
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad(), routing_override(query_ratio=0.5, seed=5):
        expected = model.eval()(images)
    state = torch.get_rng_state()
    with mmtoken.token_losses() as losses, routing_override(query_ratio=0.5, seed=5):
        maps = model.train()(images)
    assert torch.equal(torch.get_rng_state(), state)
    for ours, theirs in zip(maps, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert losses['query_ratio_s0'].item() == pytest.approx(0.5, abs=0.01)
    weight = model.layers[0].blocks[0].router.gate.weight
    for loss in (sum(m.square().sum() for m in maps), losses.total()):
        (grad,) = torch.autograd.grad(loss, weight, retain_graph=True)
        assert grad.abs().sum() > 0


def test_replayed_layouts_are_drawn_once(monkeypatch):
    counts, draws = torch.tensor([(16, 4, 1)] * 9), []
    draw = RoutingOverride.draw
    monkeypatch.setattr(RoutingOverride, 'draw', lambda *args: draws.append(1) or draw(*args))

    def two_layouts():
        override = current_override('query_ratio')
        return [override.draw(counts, 2) for _ in range(2)]

    with routing_override(query_ratio=(0.3, 0.6)):
        expected = two_layouts()
    replay = replayed_routing(query_ratio=(0.3, 0.6))
    for _ in range(3):
        with replay():
            found = two_layouts()
        assert current_override('query_ratio') is None
        assert all(map(torch.equal, found, expected))
    assert len(draws) == 2 + 2
    with pytest.raises(ValueError, match='query_ratio must be in'):
        replayed_routing(query_ratio=2)
