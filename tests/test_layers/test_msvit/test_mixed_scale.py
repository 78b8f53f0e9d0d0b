from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmtoken.layers.common.attention import attention_reference, gated_attention
from mmtoken.layers.common.regions import RegionLayout, all_cells, make_region_layout
from mmtoken.layers.common.utils import to_map
from mmtoken.layers.msvit.mixed_scale import (
    GatedLayout,
    MaskedLayout,
    PackedLayout,
    build_layout,
    fine_layout,
    order_by_windows,
    restore_features,
)

DATA = Path(__file__).parents[2] / 'data'
HEADS = 2
KINDS = dict(dropped=PackedLayout, gathered=GatedLayout, masked=MaskedLayout)


# The golden data


class Golden:
    """Its tensors by name, and what our order of tokens makes of its own, coarse ones first."""

    regions = make_region_layout((8, 8), (1, 2), 2)
    order = torch.cat([torch.arange(16, 80), torch.arange(16)])

    def __init__(self):
        self.arrays = dict(np.load(DATA / 'msvit_tokens_golden.npz'))

    def __getitem__(self, name):
        return torch.from_numpy(self.arrays[name])

    def mixture(self, kind):
        """The mixture, and the gates to differentiate with respect to: 1 where it is coarse."""
        coarse = self['gate'].requires_grad_(kind != 'dropped')
        gates = torch.stack([1 - coarse, coarse], dim=-1)
        return build_layout(gates, self.regions, masked=kind == 'masked'), coarse

    def tokens(self, mixture):
        return self['full_tokens'][:, self.order].flatten(0, 1)[mixture.index]

    def attend(self, mixture, tokens):
        query, key, value = (split(tokens @ self[name]) for name in ('wq', 'wk', 'wv'))
        return mixture.attn_fn(windowed=False)(query, key, value).flatten(1) @ self['wo']

    def of_cells(self, name, mixture):
        """Values of its tokens ``(B, 80, ...)`` that ours should have."""
        return self[name][:, self.order].flatten(0, 1)[mixture.index]


def split(x):
    return x.unflatten(-1, (HEADS, -1))


def close(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@pytest.fixture(scope='module')
def golden():
    return Golden()


@pytest.mark.parametrize('kind', ['dropped', 'gathered'])
def test_golden_tokens(golden, kind):
    mixture, _ = golden.mixture(kind)
    assert mixture.lengths == golden['lengths'].tolist()
    assert torch.equal(mixture.choice, golden['gate'].long())
    assert (golden.of_cells('mask', mixture) == 1).all()
    # Its places of our tokens: the same set, one by one.
    sources = [golden.order[cells % 80] for cells in mixture.index.split(mixture.lengths)]
    parts = golden.tokens(mixture).split(mixture.lengths)
    owners = mixture.owner - torch.tensor([[0], [mixture.lengths[0]]])
    for i, (source, tokens, owner) in enumerate(zip(sources, parts, owners, strict=True)):
        theirs = golden['packed_src_index'][i, : len(source)].tolist()
        places = torch.tensor([theirs.index(n) for n in source.tolist()])
        assert sorted(places.tolist()) == list(range(len(theirs)))
        assert torch.equal(golden['packed_tokens'][i, places], tokens)
        assert torch.equal(places[owner], golden['dense_gather_index'][i])


@pytest.mark.parametrize('kind', KINDS)
def test_golden_attention_and_map(golden, kind):
    """Rows of hidden tokens too, though nobody sees them."""
    mixture, _ = golden.mixture(kind)
    out = golden.attend(mixture, golden.tokens(mixture))
    assert len(out) == (2 * 80 if kind == 'masked' else golden['lengths'].sum())
    close(out, golden.of_cells('masked_out', mixture))
    dense = to_map(mixture.restore(out).unflatten(1, (8, 8)))
    close(dense, golden['dense_map'])
    restored, coarse = restore_features(mixture.to_features(out))
    close(restored, golden['dense_map'])
    expected = golden['gate'][:, None].repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.equal(coarse, expected)


def test_golden_weights(golden):
    """Those with which values are added up: attention to values that tell the keys apart."""
    mixture, _ = golden.mixture('masked')
    tokens = golden.tokens(mixture)
    query, key = (split(tokens @ golden[name]) for name in ('wq', 'wk'))
    every_key = torch.eye(80, dtype=torch.float64).repeat(2, 1)[:, None].expand(-1, HEADS, -1)
    weights = gated_attention(query, key, every_key, mixture.gate, [80, 80])
    weights = weights.unflatten(0, (2, 80)).transpose(1, 2)
    close(weights, golden['masked_attn'][:, :, golden.order][..., golden.order])


def golden_loss(golden, mixture, through_map=True):
    out = golden.attend(mixture, golden.tokens(mixture))
    if not through_map:
        mixture = replace(mixture, gate=mixture.gate.detach())
    return F.mse_loss(mixture.restore(out), golden['target'])


@pytest.mark.parametrize(
    'through_map, name', [(True, 'd_gate_mask_and_recon'), (False, 'd_gate_mask_only')]
)
def test_golden_gradient(golden, through_map, name):
    """Of hard gates, as straight-through estimation gives it to the soft ones."""
    mixture, coarse = golden.mixture('masked')
    loss = golden_loss(golden, mixture, through_map)
    close(loss, golden['loss'])
    (grad,) = torch.autograd.grad(loss, coarse)
    close(grad, golden[name])


def test_golden_loss_of_tokens_in_use(golden):
    mixture, coarse = golden.mixture('gathered')
    loss = golden_loss(golden, mixture)
    close(loss, golden['loss'])
    (grad,) = torch.autograd.grad(loss, coarse)
    assert grad.all() and not torch.allclose(grad, golden['d_gate_mask_and_recon'])


# Any grid


class Layout(NamedTuple):
    regions: RegionLayout
    choice: Tensor  # 1 where a region is coarse
    window: int | None  # in regions

    @property
    def gates(self):
        return F.one_hot(self.choice, 2).double()

    def mix(self, kind, gates=None):
        gates = self.gates if gates is None else gates
        if kind != 'dropped' and not gates.requires_grad:
            gates = gates.requires_grad_()
        return build_layout(gates, self.regions, self.window, masked=kind == 'masked')


@st.composite
def layouts(draw):
    grid = draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    ratio = draw(st.integers(2, 4))
    window = draw(st.sampled_from([None, 1, 2, 3]))
    extra = 0 if window else draw(st.integers(0, 2))
    regions = make_region_layout(grid, (1, ratio), ratio, extra)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    batch = draw(st.integers(1, 3))
    choice = torch.randint(2, (batch, *regions.shape), generator=generator)
    return Layout(regions, choice, window)


class Token(NamedTuple):
    window: tuple[int, int]
    places: list[int]  # that it stands for, extra tokens first
    used: bool


def naive_tokens(layout, kind):
    """Of each image its tokens in order: extra, fine and coarse ones, all that windows sort."""
    (height, width), side = layout.regions.grid, layout.regions.region_size
    extra, images = layout.regions.num_prefix_tokens, []
    window_side = side * (layout.window or 100)
    for choice in layout.choice.tolist():
        tokens = [Token((0, 0), [i], True) for i in range(extra)]
        for step in (1, side):
            for top in range(0, height, step):
                for left in range(0, width, step):
                    places = [
                        extra + y * width + x
                        for y in range(top, min(top + step, height))
                        for x in range(left, min(left + step, width))
                    ]
                    used = choice[top // side][left // side] == (step == side)
                    if used or kind == 'masked':
                        window = (top // window_side, left // window_side)
                        tokens.append(Token(window, places, used))
        images.append(sorted(tokens, key=lambda token: token.window))
    return images


def random_tokens(images, channels=3):
    return torch.randn(sum(map(len, images)), channels, dtype=torch.float64)


@settings(max_examples=60, deadline=None)
@given(layouts(), st.sampled_from(list(KINDS)))
def test_restored_tokens_stand_where_they_should(layout, kind):
    mixture, images = layout.mix(kind), naive_tokens(layout, kind)
    assert mixture.lengths == [len(tokens) for tokens in images]
    tokens = random_tokens(images)
    regions = layout.regions
    length = regions.num_prefix_tokens + len(regions.token_region)
    expected = torch.full((len(images), length, 3), float('nan'), dtype=torch.float64)
    for value, (b, token) in zip(
        tokens, ((b, t) for b, image in enumerate(images) for t in image), strict=True
    ):
        if token.used:
            assert expected[b, token.places].isnan().all()
            expected[b, token.places] = value
    restored = mixture.restore(tokens)
    assert torch.equal(restored, expected)

    features = mixture.to_features(tokens)
    assert features.lengths.sum() == len(features.tokens) and features.grid == regions.grid
    dense, coarse = restore_features(features)
    assert torch.equal(
        dense, to_map(expected[:, regions.num_prefix_tokens :].unflatten(1, regions.grid))
    )
    chosen = layout.choice.flatten(1)[:, regions.token_region].view(len(images), 1, *regions.grid)
    assert torch.equal(coarse, chosen.double())


@settings(max_examples=30, deadline=None)
@given(layouts())
def test_mixture_of_one_scale(layout):
    """That of the twin: the tokens of the grid as they are, but for windows."""
    regions = make_region_layout(
        layout.regions.grid, (1,), layout.regions.region_size, layout.regions.num_prefix_tokens
    )
    mixture = fine_layout(regions, 2, layout.window)
    x = torch.randn(2, regions.num_cells_total, 3)
    packed = mixture.pack(x)
    assert mixture.lengths == [regions.num_cells_total] * 2
    assert torch.equal(mixture.restore(packed), x)
    dense, coarse = restore_features(mixture.to_features(packed))
    assert torch.equal(dense, to_map(x[:, regions.num_prefix_tokens :].unflatten(1, regions.grid)))
    assert not coarse.any()
    fine = layout._replace(choice=torch.zeros(2, *layout.regions.shape, dtype=torch.long))
    assert torch.equal(fine.mix('dropped').restore(packed), x)


@settings(max_examples=60, deadline=None)
@given(layouts(), st.sampled_from(list(KINDS)))
def test_windows_are_sequences(layout, kind):
    mixture, images = layout.mix(kind), naive_tokens(layout, kind)
    assert type(mixture) is KINDS[kind]
    if layout.window is None:
        assert mixture.windows == mixture.lengths
        assert torch.equal(mixture.index, mixture.index.sort().values)
        return
    expected = []
    for tokens in images:
        windows = [token.window for token in tokens]
        expected += [windows.count(window) for window in sorted(set(windows))]
    assert mixture.windows == expected
    unordered = layout._replace(window=None).mix(kind)
    assert torch.equal(mixture.index.sort().values, unordered.index)


def test_order_by_windows():
    """Windows of two regions of two tokens, on a grid of three by five regions."""
    regions = make_region_layout((5, 10), (1, 2), 2)
    index = all_cells(regions, 2).cells
    order, windows = order_by_windows(index, regions, 2, batch=2)
    assert windows == [20, 20, 10, 6, 6, 3] * 2
    first = [0, 1, 2, 3, 10, 11, 12, 13, 20, 21, 22, 23, 30, 31, 32, 33, 50, 51, 55, 56]
    assert order[:20].tolist() == first
    assert order[65:85].tolist() == [65 + n for n in first]
    order, windows = order_by_windows(index, regions, 5, batch=2)
    assert windows == [65, 65] and torch.equal(order, torch.arange(130))


def attend(mixture, tokens, weights, windowed):
    query, key, value = (split(tokens @ w) for w in weights)
    return mixture.attn_fn(windowed)(query, key, value).flatten(1)


def naive_attention(images, tokens, weights, windowed):
    """Of tokens in use, one by one; others get nothing."""
    query, key, value = (split(tokens @ w) for w in weights)
    out, start = torch.zeros_like(tokens), 0
    for image in images:
        for i, token in enumerate(image, start):
            if not token.used:
                continue
            seen = [
                j
                for j, other in enumerate(image, start)
                if other.used and (not windowed or other.window == token.window)
            ]
            q, k, v = query[i][:, None], key[seen].transpose(0, 1), value[seen].transpose(0, 1)
            out[i] = attention_reference(q, k, v).flatten()
        start += len(image)
    return out


@settings(max_examples=25, deadline=None)
@given(layouts(), st.sampled_from(list(KINDS)), st.booleans())
def test_tokens_see_those_in_use_alone(layout, kind, windowed):
    windowed = windowed and layout.window is not None
    mixture, images = layout.mix(kind), naive_tokens(layout, kind)
    tokens = random_tokens(images, 4)
    weights = torch.randn(3, 4, 4, dtype=torch.float64)
    out = attend(mixture, tokens, weights, windowed)
    used = torch.tensor([token.used for image in images for token in image])
    close(out[used], naive_attention(images, tokens, weights, windowed)[used])
    assert out.isfinite().all()


@settings(max_examples=30, deadline=None)
@given(layouts(), st.booleans())
def test_hidden_tokens_might_as_well_not_be_there(layout, windowed):
    """Same map, and same gradients but for the gate, which they teach something."""
    windowed = windowed and layout.window is not None
    regions, batch = layout.regions, len(layout.choice)
    x = torch.randn(batch, regions.num_cells_total, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(3, 4, 4, dtype=torch.float64, requires_grad=True)
    target, results = None, {}
    for kind in ('dropped', 'gathered', 'masked', 'masked, in use'):
        gates = layout.gates.requires_grad_(kind != 'dropped')
        mixture = layout.mix(kind.split(',')[0], gates)
        if kind == 'masked, in use':
            learning = torch.where(mixture.gate > 0, mixture.gate, mixture.gate.detach())
            mixture = replace(mixture, gate=learning)
        tokens = mixture.pack(x)
        out = mixture.restore(tokens + attend(mixture, tokens, weights, windowed))
        target = torch.randn_like(out) if target is None else target
        leaves = [x, weights, *([gates] if gates.requires_grad else [])]
        grads = torch.autograd.grad((out * target).sum() + out.square().sum(), leaves)
        results[kind] = out.detach(), grads
    expected, (d_x, d_weights) = results.pop('dropped')
    for out, grads in results.values():
        close(out, expected)
        close(grads[0], d_x)
        close(grads[1], d_weights)
    gathered, masked, in_use = (grads[2] for _, grads in results.values())
    close(gathered, in_use)
    assert not (gathered * (1 - layout.gates)).any()
    close(masked * layout.gates, in_use * layout.gates)


@pytest.mark.parametrize('kind', ['gathered', 'masked'])
def test_nothing_learns_without_gradients(kind):
    layout = Layout(make_region_layout((4, 4), (1, 2), 2), torch.tensor([[[0, 1], [1, 1]]]), None)
    mixture = build_layout(layout.gates, layout.regions, masked=kind == 'masked')
    assert type(mixture) is PackedLayout and mixture.lengths == [7]


def test_features_without_extra_tokens():
    """A neck gets them where tokens go as they are, and no place is theirs."""
    regions = make_region_layout((4, 5), (1, 2), 2, num_prefix_tokens=2)
    layout = Layout(regions, torch.tensor([[[0, 1, 1], [1, 1, 0]]]), None)
    dropped, masked = (layout.mix(kind) for kind in ('dropped', 'masked'))
    features = dropped.to_features(torch.randn(dropped.lengths[0], 3))
    assert features.lengths.tolist() == dropped.lengths == [2 + 4 + 2 + 4]
    assert features.layout[:, 0].min() == 2 and features.layout.shape == (1, 2, 20)
    features = masked.to_features(torch.randn(masked.lengths[0], 3))
    assert features.lengths.tolist() == [20] and features.layout[0, 0].tolist() == list(range(20))
