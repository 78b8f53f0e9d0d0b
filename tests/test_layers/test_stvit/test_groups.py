from functools import partial

import pytest
import torch

from mmtoken.layers.common.vit import CrossAttentionBlock
from mmtoken.layers.stvit.groups import most_attended, record_attended
from mmtoken.layers.stvit.semantic_swin import WindowSpec, patches_of_semantic, pool_windows
from mmtoken.layers.stvit.semantic_vit import SpatialPooling
from mmtoken.runtime.decisions import record_tokens

HEADS = 2


def weights(query, key):
    query, key = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (query, key))
    scores = query @ key.mT / query.shape[-1] ** 0.5
    return scores.softmax(dim=-1).mean(dim=1)


@pytest.mark.parametrize('number', [3, 8, 21])  # of keys, fewer and more than channels of a head
def test_most_attended_key(number):
    query, key_value = torch.randn(2, 10, 16), torch.randn(2, number, 32)
    expected = weights(query, key_value[..., :16]).argmax(dim=-1)
    assert most_attended(query, key_value, HEADS).equal(expected)


def test_keys_out_of_reach_are_never_attended():
    spec, grid = WindowSpec(4, 2, 'exact'), (8, 12)
    semantic, attend = patches_of_semantic(torch.randn(1, 4, 6, 16), spec, 2, grid)
    key_value = torch.cat([semantic, semantic], dim=-1)
    owner = most_attended(torch.randn(1, *grid, 16), key_value, HEADS, attend)
    rows, columns = torch.arange(8)[:, None] // 4, torch.arange(12) // 4
    assert (owner // 6 // 2 == rows).all() and (owner % 6 // 2 == columns).all()


def test_attention_of_a_block_is_recorded():
    block = CrossAttentionBlock(16, HEADS, 32)
    image, semantic = torch.randn(2, 12, 16), torch.randn(2, 5, 16)
    with record_tokens() as records:
        record_attended(block, image, semantic, (3, 4))
    query, key = (block.norm1(t) for t in (image, semantic))
    expected = weights(block.attn.q(query), block.attn.kv(key)[..., :16]).argmax(dim=-1)
    assert records[0].owner.equal(expected.view(2, 3, 4)) and not records[0].complete


def test_image_tokens_are_pooled_to_these_semantic_tokens():
    """The maximum of a window is in the semantic token that its place is recorded for."""
    windows = partial(pool_windows, windows=WindowSpec(6, 3, None), conv_pos=None)
    pooling = SpatialPooling(1, 4, 'max')
    for pool, pooled_grid in ((windows, (6, 6)), (pooling, (2, 3))):
        x = torch.zeros(1, 7, 10, 1)
        with record_tokens() as records:
            pool(x)
        owner = records[0].owner[0]
        for place in ((0, 0), (3, 5), (6, 9)):
            one = x.clone()
            one[0, place[0], place[1]] = 1.0
            row, column = (pool(one).view(pooled_grid) == 1).nonzero()[0].tolist()
            assert owner[place] == row * 10 + column
