from functools import partial
from itertools import product

import pytest
import torch
from timm.models.vision_transformer import Block
from torch import nn

from mmtoken.layers.common.attention import varlen_attention
from mmtoken.layers.common.vit import CrossAttentionBlock, ViTBlock

LENGTHS = [5, 1, 9, 4]


def make(**kwargs):
    block = ViTBlock(24, 3, 36, **kwargs)
    for name, parameter in block.named_parameters():
        nn.init.normal_(parameter, std=0.3)
        if 'norm' in name and name.endswith('weight'):
            nn.init.normal_(parameter, 1, 0.1)
    return block


def run(block, x, lengths):
    return block(x, partial(varlen_attention, lengths=lengths), lengths)


@pytest.mark.parametrize('layer_scale', [None, 0.1])
@pytest.mark.parametrize('qkv_bias', [True, False])
@pytest.mark.parametrize('training', [True, False])
def test_block_is_timms(layer_scale, qkv_bias, training):
    """Names of parameters included."""
    ours = make(layer_scale=layer_scale, qkv_bias=qkv_bias).train(training)
    theirs = Block(
        24, 3, mlp_ratio=1.5, qkv_bias=qkv_bias, init_values=layer_scale,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
    ).train(training)  # fmt: skip
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(3, 7, 24)
    for context in (torch.enable_grad, torch.no_grad):
        with context():
            expected = theirs(x)
            torch.testing.assert_close(ours(x), expected, atol=1e-5, rtol=1e-5)
            out = run(ours, x.flatten(0, 1), [7] * 3)
            torch.testing.assert_close(out, expected.flatten(0, 1), atol=1e-5, rtol=1e-5)


def test_images_of_different_lengths():
    block, x = make().eval(), torch.randn(sum(LENGTHS), 24)
    expected = [run(block, part, [len(part)]) for part in x.split(LENGTHS)]
    torch.testing.assert_close(run(block, x, LENGTHS), torch.cat(expected), atol=1e-5, rtol=1e-5)


def attended(block, x):
    """What attention gives the tokens of one image, projected."""
    parts = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, 3, -1)).unbind(1)
    return block.attn.proj(varlen_attention(*parts, [len(x)]).flatten(1))


def with_kept(block, x, attention, mlp):
    x = x + block.ls1(attended(block, x)) * attention
    return x + block.ls2(block.mlp(block.norm2(x))) * mlp


def test_stochastic_depth_drops_images():
    """Attention and MLP apart, for all tokens of an image alike, and scales what it keeps."""
    block = make(drop_path=0.5, layer_scale=0.3).train()
    images, seen = [torch.randn(length, 24) for length in (3, 5)], [set(), set()]
    with torch.no_grad():
        for _ in range(40):
            outs = run(block, torch.cat(images), [3, 5]).split([3, 5])
            for x, out, kinds in zip(images, outs, seen, strict=True):
                found = [
                    kept
                    for kept in product((0.0, 2.0), repeat=2)
                    if torch.allclose(with_kept(block, x, *kept), out, atol=1e-5)
                ]
                assert len(found) == 1
                kinds.update(found)
    assert len(seen[0]) == len(seen[1]) == 4


def test_stochastic_depth_is_of_training_alone():
    plain, x = make().train(), torch.randn(6, 24)
    block = make(drop_path=0.9).eval()
    block.load_state_dict(plain.state_dict())
    state = torch.get_rng_state()
    assert torch.equal(run(block, x, [2, 4]), run(plain, x, [2, 4]))
    assert torch.equal(torch.get_rng_state(), state)


# Cross-attention


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
