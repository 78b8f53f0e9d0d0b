"""Merging against an obvious reference, and what any number of merges keeps."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtoken.layers.merge import mutual_pairs
from mmtoken.layers.merge.mutual_pairs import (
    find_mutual_pairs,
    merge_mutual_pairs,
    nearest_neighbors,
    unmerge,
    unmerged_layout,
)

CHANNELS = 5


def merge_reference(groups):
    """Merge the tokens of one image, each a pair of its places and its vector, pair by pair."""

    def nearest(i):
        others = [j for j in range(len(groups)) if j != i]
        cosine = [torch.cosine_similarity(groups[i][1], groups[j][1], dim=0) for j in others]
        return others[int(torch.stack(cosine).argmax())] if others else i

    neighbor = [nearest(i) for i in range(len(groups))]
    merged = []
    for i, (places, vector) in enumerate(groups):
        j = neighbor[i]
        if neighbor[j] != i or i == j:
            merged.append((places, vector))
        elif i < j:
            more, other = groups[j]
            total = len(places) * vector + len(more) * other
            merged.append((places + more, total / (len(places) + len(more))))
    return merged


def start(batch, grid, num_prefix_tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    layout = unmerged_layout(grid, num_prefix_tokens, batch, torch.device('cpu'))
    tokens = torch.randn(sum(layout.lengths), CHANNELS, generator=generator, dtype=torch.float64)
    return tokens, layout


def cases(function):
    strategies = dict(
        batch=st.integers(1, 3),
        grid=st.tuples(st.integers(1, 5), st.integers(1, 5)),
        num_prefix_tokens=st.integers(0, 2),
        merges=st.integers(0, 3),
        seed=st.integers(0, 1000),
    )
    return settings(max_examples=60, deadline=None)(given(**strategies)(function))


@cases
def test_equals_the_reference(batch, grid, num_prefix_tokens, merges, seed):
    """Image by image, whatever else is in the batch; prefix tokens stay as they are."""
    tokens, layout = start(batch, grid, num_prefix_tokens, seed)
    images = tokens.view(batch, -1, CHANNELS)
    for _ in range(merges):
        tokens, layout = merge_mutual_pairs(tokens, layout)
    sizes = layout.sizes.split(layout.lengths)
    for image, packed, size in zip(images, tokens.split(layout.lengths), sizes, strict=True):
        groups = [([place], token) for place, token in enumerate(image[num_prefix_tokens:])]
        for _ in range(merges):
            groups = merge_reference(groups)
        expected = [*image[:num_prefix_tokens], *(vector for _, vector in groups)]
        torch.testing.assert_close(packed, torch.stack(expected))
        assert size.tolist() == [1] * num_prefix_tokens + [len(places) for places, _ in groups]


@cases
def test_round_trip(batch, grid, num_prefix_tokens, merges, seed):
    """Each place gets the mean over all places of its group, after any number of merges."""
    tokens, layout = start(batch, grid, num_prefix_tokens, seed)
    dense = tokens
    for _ in range(merges):
        tokens, layout = merge_mutual_pairs(tokens, layout)
    length = num_prefix_tokens + grid[0] * grid[1]
    assert layout.grid == grid and layout.owner.shape == (batch, length)
    assert sum(layout.lengths) == len(tokens) == len(layout.sizes)
    ends = torch.tensor(layout.lengths).cumsum(0)
    for owner, end, n in zip(layout.owner, ends, layout.lengths, strict=True):
        assert owner.min() == end - n and owner.max() == end - 1  # of its own image
        assert owner.unique().numel() == n
    sizes = torch.bincount(layout.owner.flatten(), minlength=len(tokens))
    assert torch.equal(layout.sizes, sizes.to(layout.sizes))
    assert layout.sizes.sum() == batch * length
    sums = torch.zeros_like(tokens).index_add(0, layout.owner.flatten(), dense)
    mean = (sums / sizes[:, None])[layout.owner]
    torch.testing.assert_close(unmerge(tokens, layout), mean)


@cases
def test_half_of_the_tokens_stay(batch, grid, num_prefix_tokens, merges, seed):
    tokens, layout = start(batch, grid, num_prefix_tokens, seed)
    for _ in range(merges):
        before = layout.lengths
        tokens, layout = merge_mutual_pairs(tokens, layout)
        for n, more in zip(layout.lengths, before, strict=True):
            patches = more - num_prefix_tokens
            assert num_prefix_tokens + -(-patches // 2) <= n < more or n == more == (
                num_prefix_tokens + 1
            )


def test_unmerging_what_never_merged_changes_nothing():
    tokens, layout = start(2, (3, 4), 1, 0)
    assert torch.equal(unmerge(tokens, layout), tokens.view(2, 13, CHANNELS))


def test_only_mutual_neighbors_are_a_pair():
    """On a line 0 and 1 are nearest to each other, and 2 to 1; nobody is left for 2."""
    angle = torch.tensor([0.0, 0.1, 0.3, 2.0, 2.5])
    x = torch.stack([angle.cos(), angle.sin()], dim=1)
    assert nearest_neighbors(x)[0].tolist() == [1, 0, 1, 4, 3]
    assert find_mutual_pairs(x).tolist() == [1, 0, 2, 4, 3]


def test_lengths_of_vectors_do_not_matter():
    x = torch.randn(50, 8)
    pairs = find_mutual_pairs(x)
    assert torch.equal(find_mutual_pairs(x * torch.rand(50, 1).add(0.1)), pairs)
    assert 10 < (pairs != torch.arange(50)).sum() < 50


def test_of_equally_near_neighbors_the_first_counts():
    x = torch.ones(4, 3)
    assert nearest_neighbors(x)[0].tolist() == [1, 0, 0, 0]
    assert find_mutual_pairs(x).tolist() == [1, 0, 2, 3]
    assert find_mutual_pairs(torch.zeros(4, 3)).tolist() == [1, 0, 2, 3]


@pytest.mark.parametrize('elements', [1, 70, 300])
def test_similarities_in_parts(elements, monkeypatch):
    x = torch.randn(60, 8)
    expected, _ = nearest_neighbors(x)
    monkeypatch.setattr(mutual_pairs, 'MAX_SIMILARITIES', elements)
    assert torch.equal(nearest_neighbors(x)[0], expected)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_similarities_are_in_full_precision(dtype):
    """Under autocast too: neighbors that bfloat16 products cannot tell apart."""
    x = torch.randn(200, 16).to(dtype)
    expected, _ = nearest_neighbors(x.float())
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert torch.equal(nearest_neighbors(x)[0], expected)
        assert torch.equal(nearest_neighbors(x.float())[0], expected)


def test_tokens_keep_their_dtype_and_gradient():
    tokens, layout = start(2, (4, 4), 1, 0)
    for dtype in (torch.float32, torch.bfloat16):
        assert merge_mutual_pairs(tokens.to(dtype), layout)[0].dtype == dtype
    tokens.requires_grad_()
    merged, layout = merge_mutual_pairs(tokens, layout)
    (gradient,) = torch.autograd.grad(merged.sum(), tokens)
    share = (1 / layout.sizes)[layout.owner.flatten()].to(gradient)
    torch.testing.assert_close(gradient, share[:, None].expand_as(gradient))


def test_proportional_attention_counts_patches():
    """As if each key were there once for each patch it stands for."""
    tokens, layout = start(2, (4, 5), 1, 3)
    merged, layout = merge_mutual_pairs(tokens, layout)
    assert len(set(layout.lengths)) == 2
    query, key, value = torch.randn(3, len(merged), 2, 4, dtype=torch.float64)
    copies = layout.owner  # (B, P + H * W)
    expected = []
    for image, q in enumerate(query.split(layout.lengths)):
        k, v = key[copies[image]], value[copies[image]]
        scores = torch.einsum('qhd,khd->hqk', q, k) * 4**-0.5
        expected.append(torch.einsum('hqk,khd->qhd', scores.softmax(-1), v))
    out = layout.attn_fn(proportional=True)(query, key, value)
    torch.testing.assert_close(out, torch.cat(expected))
    plain = layout.attn_fn(proportional=False)(query, key, value)
    assert (plain - out).abs().max() > 1e-3


def test_one_synchronization(monkeypatch):
    """However many images there are."""
    seen, tolist = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, 'tolist', lambda t: seen.append(t) or tolist(t))
    monkeypatch.setattr(torch.Tensor, 'item', lambda t: pytest.fail('synchronizes'))
    monkeypatch.setattr(torch.Tensor, 'nonzero', lambda t: pytest.fail('synchronizes'))
    merge_mutual_pairs(*start(3, (4, 4), 1, 0))
    assert len(seen) == 1
