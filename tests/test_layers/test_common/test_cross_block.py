from functools import partial

import pytest
import torch
from timm.models.vision_transformer import Block
from torch import nn

from mmtoken.layers.common.vit import CrossAttentionBlock

SHAPE = dict(embed_dims=12, num_heads=3, feedforward_channels=20)


@pytest.mark.parametrize('layer_scale', [None, 0.3])
@pytest.mark.parametrize('qkv_bias', [True, False])
def test_self_attention_is_a_block_of_timm(layer_scale, qkv_bias):
    block = CrossAttentionBlock(**SHAPE, qkv_bias=qkv_bias, layer_scale=layer_scale)
    dense = Block(
        12, 3, 20.5 / 12, qkv_bias, init_values=layer_scale,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
    )  # fmt: skip
    state = block.state_dict()
    for kind in ('weight', 'bias') if qkv_bias else ('weight',):
        parts = [state.pop(f'attn.{name}.{kind}') for name in ('q', 'kv')]
        state[f'attn.qkv.{kind}'] = torch.cat(parts)
    dense.load_state_dict(state)
    x = torch.randn(2, 9, 12)
    torch.testing.assert_close(block(x, x), dense(x))


def test_residual():
    block = CrossAttentionBlock(**SHAPE)
    nn.init.zeros_(block.mlp.fc2.weight)
    nn.init.zeros_(block.mlp.fc2.bias)
    query, tokens, residual = torch.randn(2, 5, 12), torch.randn(2, 7, 12), torch.randn(2, 5, 12)
    update = block.attn(block.norm1(query), block.norm1(tokens))
    torch.testing.assert_close(block(query, tokens), query + update)
    torch.testing.assert_close(block(query, tokens, residual), residual + update)
