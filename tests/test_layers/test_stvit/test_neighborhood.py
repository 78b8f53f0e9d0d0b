import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtoken.layers.common.cache import PLANS
from mmtoken.layers.common.windows import window_index
from mmtoken.layers.stvit import neighborhood
from mmtoken.layers.stvit.neighborhood import (
    NeighborhoodSpec,
    neighborhood_attention,
    neighborhood_attention_reference,
    plan_groups,
)

MASKS = ['released', 'exact', None]
CPU = torch.device('cpu')


def attend_naively(query, tokens, padding, spec, num_heads):
    """Query by query, key by key, from the definition."""
    (height, width), stride = spec.key_grid, spec.key_window_size
    rows, columns = (n * stride for n in spec.num_windows)
    before = (spec.patch_size - stride) // 2
    out = torch.empty_like(query)
    places = itertools.product(range(query.shape[1]), range(query.shape[2]))
    for b, (y, x) in itertools.product(range(len(query)), places):
        i, j = y // spec.query_window_size, x // spec.query_window_size
        keys, masked = [], []
        for dy, dx in itertools.product(range(spec.patch_size), range(spec.patch_size)):
            v, u = i * stride - before + dy, j * stride - before + dx
            inside = 0 <= v < height and 0 <= u < width
            keys.append(tokens[b, v, u] if inside else padding)
            outside = not (0 <= v < rows and 0 <= u < columns)
            low, right = v >= rows - spec.padded_hw[0], u >= columns - spec.padded_hw[1]
            if spec.pad_mask == 'released':
                low, right = low or not spec.padded_hw[0], right or not spec.padded_hw[1]
                masked.append(outside or (low and right))
            else:
                masked.append(spec.pad_mask == 'exact' and (outside or low or right))
        seen = [k for k, m in zip(keys, masked, strict=True) if not m] or keys
        key, value = (t.unflatten(-1, (num_heads, -1)) for t in torch.stack(seen).chunk(2, -1))
        q = query[b, y, x].unflatten(-1, (num_heads, -1))
        weight = (torch.einsum('hd,khd->hk', q, key) * q.shape[-1] ** -0.5).softmax(-1)
        out[b, y, x] = torch.einsum('hk,khd->hd', weight, value).flatten()
    return out


def inputs(spec, batch=2, channels=8, **kwargs):
    """Queries, keys and values, and the padding's."""
    shapes = [(batch, *spec.query_grid, channels), (batch, *spec.key_grid, 2 * channels)]
    return [torch.randn(s, dtype=torch.float64, **kwargs) for s in (*shapes, (2 * channels,))]


def surround(tokens, padding, spec):
    """Put ``spec.padding`` around the key grid."""
    real = F.pad(torch.ones_like(tokens[..., :1]), (0, 0, *spec.padding))
    return F.pad(tokens, (0, 0, *spec.padding)) + (1 - real) * padding


def append(tokens, padding):
    """The tokens row by row, then the padding token."""
    return torch.cat([tokens.flatten(1, 2), padding.expand(len(tokens), 1, -1)], dim=1)


specs = st.builds(
    lambda rows, columns, sizes, cut, extra, hidden, pad_mask: NeighborhoodSpec(
        query_grid=tuple(
            n * sizes[0] - min(c, sizes[0] - 1) for n, c in zip((rows, columns), cut, strict=True)
        ),
        query_window_size=sizes[0],
        key_grid=tuple(
            n * sizes[1] - min(c, sizes[1] - 1) for n, c in zip((rows, columns), cut, strict=True)
        ),
        key_window_size=sizes[1],
        patch_size=sizes[1] + extra,
        # Exact: at least the padding is hidden, never a whole axis of windows.
        padded_hw=hidden if pad_mask == 'released' else tuple(min(c, sizes[1] - 1) for c in cut),
        pad_mask=pad_mask,
    ),
    rows=st.integers(1, 4),
    columns=st.integers(1, 4),
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    cut=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    extra=st.integers(0, 7),
    hidden=st.tuples(st.integers(0, 6), st.integers(0, 6)),
    pad_mask=st.sampled_from(MASKS),
)


@settings(max_examples=40, deadline=None)
@given(spec=specs, side=st.sampled_from([1, 2, 8]))
def test_forms_equal_the_definition(spec, side):
    torch.manual_seed(0)
    query, tokens, padding = inputs(spec)
    expected = attend_naively(query, tokens, padding, spec, num_heads=2)
    patches = neighborhood_attention_reference(query, surround(tokens, padding, spec), 2, spec)
    torch.testing.assert_close(patches, expected, atol=1e-9, rtol=1e-9)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(neighborhood.GROUP_SIDE, 'cpu', side)
        PLANS.clear()  # the side of groups is no part of their keys
        groups = neighborhood_attention(query, append(tokens, padding), 2, spec)
    PLANS.clear()
    torch.testing.assert_close(groups, expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize('pad_mask', MASKS)
def test_forms_have_equal_gradients(pad_mask):
    spec = NeighborhoodSpec((18, 33), 7, (8, 15), 3, 9, (1, 2), pad_mask)
    tensors = inputs(spec, requires_grad=True)
    query, tokens, padding = tensors
    weight = torch.randn_like(query)
    patches = neighborhood_attention_reference(query, surround(tokens, padding, spec), 2, spec)
    groups = neighborhood_attention(query, append(tokens, padding), 2, spec)
    grads = [torch.autograd.grad((out * weight).sum(), tensors) for out in (patches, groups)]
    for patched, grouped in zip(*grads, strict=True):
        torch.testing.assert_close(patched, grouped, atol=1e-9, rtol=1e-9)


def test_no_group_holds_a_query_twice_or_none():
    spec = NeighborhoodSpec((50, 80), 7, (24, 36), 3, 27, (6, 4), 'released')
    groups, order = plan_groups(spec, CPU, torch.float32)
    queries = torch.cat([g.queries for g in groups])
    assert torch.equal(queries[order], torch.arange(50 * 80))
    assert len(groups) == 4 * 6


def test_released_mask_of_an_unpadded_grid_hides_nothing():
    """Its border, too, is then seen: 49 places of a corner window's patch of 14 lie outside."""
    released, exact = (
        plan_groups(NeighborhoodSpec((6, 6), 3, (14, 14), 7, 14, (0, 0), m), CPU, torch.float32)[0][
            0
        ]
        for m in ('released', 'exact')
    )
    assert 14 * 14 in released.keys and 14 * 14 not in exact.keys


def plan_from_all_windows(spec, side, dtype):
    """Groups from a count of every key in every window, whose memory is their product."""
    height, width = spec.key_grid
    token = F.pad(torch.arange(height * width).view(1, height, width), spec.padding, value=-1)
    index = neighborhood._cut(token, spec)[0] % (height * width + 1)
    visible = (~neighborhood.hidden_keys(spec)).double()
    count = torch.zeros(len(index), height * width + 1, dtype=torch.float64)
    log_count = count.scatter_add_(1, index, visible).log().to(dtype)
    places = window_index(spec.query_grid, spec.query_window_size)
    for rows in torch.arange(len(places)).view(spec.num_windows).split(side):
        for members in rows.split(side, dim=1):
            log = log_count[members.flatten()]
            keys = log.isfinite().any(dim=0).nonzero().flatten()
            queries = places[members.flatten()]
            real = queries < spec.query_grid[0] * spec.query_grid[1]
            log = log[:, keys] if log[:, keys].any() else None
            order = queries[real].argsort()  # row by row, not window by window
            yield queries[real][order], real.nonzero()[order, 0], keys, log


@settings(max_examples=60, deadline=None)
@given(spec=specs, side=st.sampled_from([1, 2, 3, 8]))
def test_plans_equal_those_from_all_windows(spec, side):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(neighborhood.GROUP_SIDE, 'cpu', side)
        PLANS.clear()
        groups, order = plan_groups(spec, CPU, torch.float32)
    PLANS.clear()
    expected = list(plan_from_all_windows(spec, side, torch.float32))
    assert len(groups) == len(expected)
    for ours, theirs in zip(groups, expected, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert (one is None) == (other is None)
            assert one is None or (torch.equal(one, other) and one.dtype == other.dtype)
    assert torch.equal(order, torch.cat([g.queries for g in groups]).argsort())


def test_alike_groups_share_their_counts():
    """At 3648 x 5472 pixels; as one table of windows and keys it would be 1 GB."""
    grid, pooled = (228, 342), (99, 147)
    spec = NeighborhoodSpec(pooled, 3, grid, 7, 21, (3, 1), 'released')
    groups, _ = plan_groups(spec, CPU, torch.float32)
    tables = {g.log_count.data_ptr() for g in groups if g.log_count is not None}
    assert len(groups) > 400 and len(tables) < 20
    assert PLANS.nbytes()[CPU] < 8 * 2**20


def test_plans_are_cached():
    spec = NeighborhoodSpec((6, 6), 3, (14, 14), 7, 14, (0, 0), 'exact')
    assert plan_groups(spec, CPU, torch.float32) is plan_groups(spec, CPU, torch.float32)
