import pytest
import torch
from helpers import randomize
from timm.layers import resample_abs_pos_embed

from mmtoken.layers.common.attention import attention_reference, join_heads, split_heads
from mmtoken.layers.common.rotary import grid_rotation, rotate, rotated
from mmtoken.layers.common.vit import full_attention
from mmtoken.layers.stvit.semantic_vit import (
    SemanticPoolBlock,
    SemanticRecovery,
    SemanticRefineBlock,
    turn_tiles,
)

BLOCK = dict(num_heads=2, feedforward_channels=12)
GRID = (6, 9)


def mha(layer, query, tokens):
    """Multi-head attention as it is written: projections, softmax, projection."""
    attn = layer.attn
    key, value = attn.kv(layer.norm1(tokens)).chunk(2, dim=-1)
    heads = [split_heads(t, attn.num_heads) for t in (attn.q(layer.norm1(query)), key, value)]
    return attn.proj(join_heads(attention_reference(*heads)))


def mlp(layer, x):
    return layer.mlp.fc2(torch.nn.functional.gelu(layer.mlp.fc1(layer.norm2(x))))


def test_pool_layer_is_its_formula():
    layer, image = randomize(SemanticPoolBlock(8, 4, 'attention', **BLOCK)), torch.randn(2, 54, 8)
    semantic, initial = layer(image, GRID)
    torch.testing.assert_close(initial, layer.pool(image.view(2, *GRID, 8)))
    first = initial + mha(layer, initial, image)
    torch.testing.assert_close(semantic, first + mlp(layer, first))


@pytest.mark.parametrize('residual', ['query', 'initial'])
@pytest.mark.parametrize('center_grid', [(2, 3), (4, 4), None])
def test_refine_layer_is_its_formula(residual, center_grid):
    layer = randomize(SemanticRefineBlock(8, 4, center_grid, residual, **BLOCK))
    semantic, initial, image = torch.randn(2, 6, 8), torch.randn(2, 6, 8), torch.randn(2, 54, 8)
    query = semantic
    if center_grid is not None:
        query = semantic + resample_abs_pos_embed(layer.centers, (2, 3), center_grid, 0)
    second = initial if residual == 'initial' else query
    second = second + mha(layer, query, torch.cat([semantic, image], dim=1))
    expected = second + mlp(layer, second)
    torch.testing.assert_close(layer(semantic, initial, image, GRID), expected)


def test_recovery_is_its_formula():
    layer = randomize(SemanticRecovery(8, **BLOCK))
    image, semantic = torch.randn(2, 54, 8), torch.randn(2, 6, 8)
    x = image + mha(layer, image, semantic)
    x = x + mlp(layer, x)
    torch.testing.assert_close(layer(image, semantic), layer.norm(x))


def turned(layer, query, tokens, rotation, keys):
    """:func:`mha` with rotary positions."""
    attn = layer.attn
    key, value = attn.kv(layer.norm1(tokens)).chunk(2, dim=-1)
    heads = [t.unflatten(-1, (2, -1)) for t in (attn.q(layer.norm1(query)), key, value)]
    heads = [rotate(heads[0], rotation), rotate(heads[1], keys), heads[2]]
    return attn.proj(join_heads(attention_reference(*(t.transpose(1, 2) for t in heads))))


@pytest.mark.parametrize('kind', ['dinov3', 'eva02'])
def test_refine_and_recover_with_rotary_positions_and_prefix_tokens(kind):
    """The prefix tokens attend to all others and get no centers; the recovery has none."""
    image_turn = grid_rotation(kind, GRID, 0, 4, torch.device('cpu'))
    turn = turn_tiles(grid_rotation(kind, GRID, 3, 4, torch.device('cpu')), GRID, 4)
    image, tokens, initial = torch.randn(2, 54, 8), torch.randn(2, 9, 8), torch.randn(2, 9, 8)
    for residual in ('query', 'initial'):
        layer = randomize(SemanticRefineBlock(8, 4, (2, 3), residual, **BLOCK))
        query = torch.cat([tokens[:, :3], tokens[:, 3:] + layer.centers], dim=1)
        keys = turn.then(image_turn)
        second = initial if residual == 'initial' else query
        second = second + turned(layer, query, torch.cat([tokens, image], dim=1), turn, keys)
        out = layer(tokens, initial, image, GRID, rotated(full_attention, turn, keys))
        torch.testing.assert_close(out, second + mlp(layer, second))

    layer, keys = randomize(SemanticRecovery(8, **BLOCK)), turn.of(slice(3, None))
    x = image + turned(layer, image, tokens[:, 3:], image_turn, keys)
    out = layer(image, tokens[:, 3:], rotated(full_attention, image_turn, keys))
    torch.testing.assert_close(out, layer.norm(x + mlp(layer, x)))


def test_unknown_residual():
    with pytest.raises(ValueError, match="got 'none'"):
        SemanticRefineBlock(8, 4, None, 'none', **BLOCK)
