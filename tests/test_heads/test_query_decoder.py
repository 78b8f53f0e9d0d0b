"""Queries in the last blocks: against a plain loop over the blocks of the whole network."""

import pytest
import torch
from families import LATER, VIT

from mmtoken.backbones import DGEDeiT, MergeViT, MSViT
from mmtoken.checkpoints import load_into
from mmtoken.heads.query_decoder import QueryDecoder
from mmtoken.layers.common.rotary import grid_rotation, rotate

ARCHS = dict(vit=VIT, later={**VIT, **LATER})
QUERIES, GRID = 5, (3, 4)


def make(arch, **kwargs):
    torch.manual_seed(0)
    return QueryDecoder(4, arch=arch, num_blocks=2, num_queries=QUERIES, **kwargs)


def tokens_of(arch, prefix=2):
    return torch.randn(2, arch['embed_dims'], *GRID), torch.randn(2, prefix, arch['embed_dims'])


def reference(decoder, x, prefix, shown):
    """The blocks in plain arithmetic; block i lets tokens see ``shown[i]``, ``(B, N, N)``."""
    arch, before = decoder.arch, QUERIES + prefix.shape[1]
    tokens = torch.cat([decoder.query.expand(len(x), -1, -1), prefix, x.flatten(2).mT], 1)
    outputs = [decoder.predict(tokens, GRID, before)]
    for block, mask in zip(decoder.blocks.values(), shown, strict=True):
        attn, normed = block.attn, block.norm1(tokens)
        query, key, value = attn.qkv(normed).unflatten(-1, (3, arch['num_heads'], -1)).unbind(2)
        if attn.q_norm is not None:
            query, key = attn.q_norm(query), attn.k_norm(key)
        if arch.get('rotary'):
            turn = grid_rotation(arch['rotary'], GRID, before, query.shape[-1], x.device)
            query, key = rotate(query, turn), rotate(key, turn)
        scores = torch.einsum('bqhd,bkhd->bhqk', query, key) * query.shape[-1] ** -0.5
        scores = scores.masked_fill(~mask[:, None], float('-inf'))
        seen = torch.einsum('bhqk,bkhd->bqhd', scores.softmax(-1), value).flatten(2)
        tokens = tokens + attn.proj(seen)
        tokens = tokens + block.mlp(block.norm2(tokens))
        outputs.append(decoder.predict(tokens, GRID, before))
    return outputs


def everything(x, prefix):
    count = QUERIES + prefix.shape[1] + x.shape[2] * x.shape[3]
    return torch.ones(len(x), count, count, dtype=torch.bool)


@pytest.mark.parametrize('arch', ARCHS.values(), ids=ARCHS)
@pytest.mark.parametrize('prefix', [0, 3])
def test_testing_equals_the_blocks_without_masks(arch, prefix):
    decoder = make(arch, annealing=dict(total_iters=10)).eval()
    x, tokens = tokens_of(arch, prefix)
    [classes], [masks] = decoder(x, tokens)
    expected = reference(decoder, x, tokens, [everything(x, tokens)] * 2)[-1]
    torch.testing.assert_close((classes, masks), expected)
    assert classes.shape == (2, QUERIES, 5)
    assert masks.shape == (2, QUERIES, 4 * GRID[0], 4 * GRID[1])


@pytest.mark.parametrize('arch', ARCHS.values(), ids=ARCHS)
def test_training_hides_what_is_outside_of_masks(arch):
    decoder = make(arch, annealing=dict(total_iters=10))  # all queries have masks at first
    x, prefix = tokens_of(arch)
    classes, masks = decoder(x, prefix)
    assert len(classes) == len(masks) == 3
    before, shown = QUERIES + prefix.shape[1], []
    for predicted in masks[:-1]:
        at_tokens = torch.nn.functional.interpolate(predicted, GRID, mode='bilinear')
        mask = everything(x, prefix)
        for image, query in torch.cartesian_prod(torch.arange(2), torch.arange(QUERIES)).tolist():
            mask[image, query, before:] = at_tokens[image, query].flatten() > 0
        shown.append(mask)
    assert not all(mask.all() for mask in shown)
    for got, expected in zip(zip(classes, masks, strict=True), reference(decoder, x, prefix, shown),
                             strict=True):  # fmt: skip
        torch.testing.assert_close(got, expected)


def test_training_ends_as_testing_does():
    decoder = make(VIT, annealing=dict(total_iters=4))
    x, prefix = tokens_of(VIT)
    for _ in range(4):
        decoder(x, prefix)
    ended = [outputs[-1] for outputs in decoder(x, prefix)]
    torch.testing.assert_close(ended, [outputs[-1] for outputs in decoder.eval()(x, prefix)])


def test_everything_learns_also_with_recomputation():
    gradients = []
    for with_cp in (False, True):
        decoder = make({**VIT, **LATER}, annealing=dict(total_iters=9), with_cp=with_cp)
        torch.manual_seed(1)
        x, prefix = tokens_of(VIT)
        x.requires_grad_()
        sum(t.square().mean() for part in decoder(x, prefix) for t in part).backward()
        gradients.append([x.grad, *(p.grad for p in decoder.parameters())])
    assert all(g is not None and g.isfinite().all() for g in gradients[0])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize('arch', ARCHS.values(), ids=ARCHS)
def test_backbone_and_decoder_share_a_checkpoint(arch, tmp_path):
    whole = MSViT(arch, gate=None)
    torch.save(dict(state_dict=whole.state_dict()), tmp_path / 'vit.pth')
    depth = arch['num_layers']
    first = MSViT(arch, out_indices=(depth - 3,), out_prefix=True)
    decoder = make(arch)
    for module in (first, decoder):
        load_into(module, tmp_path / 'vit.pth')
    for name, tensor in whole.state_dict().items():
        parts = [m.state_dict()[name] for m in (first, decoder) if name in m.state_dict()]
        assert len(parts) == 1 and torch.equal(parts[0], tensor), name


def test_wrong_checkpoints_are_refused(tmp_path):
    torch.save(MSViT({**VIT, 'num_layers': 5}, gate=None).state_dict(), tmp_path / 'short.pth')
    with pytest.raises(ValueError, match=r'names it lacks: blocks\.5'):
        load_into(make(VIT), tmp_path / 'short.pth')


@pytest.mark.parametrize('cls', [MSViT, DGEDeiT, MergeViT])
def test_prefix_tokens_follow_the_map(cls):
    args = dict(cls_token=True, num_registers=2, out_indices=(1, 3))
    torch.manual_seed(0)
    backbone = cls(VIT, out_prefix=True, **args).eval()
    plain = cls(VIT, **args).eval()
    plain.load_state_dict(backbone.state_dict())
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        *maps, prefix = backbone(images)
        torch.testing.assert_close(tuple(maps), plain(images))
    assert prefix.shape == (2, 3, 32)
    without = cls(VIT, cls_token=False, out_indices=(3,), out_prefix=True).eval()
    assert without(images)[1].shape == (2, 0, 32)


@pytest.mark.parametrize(
    'arguments, message',
    [
        (dict(num_blocks=0), r'num_blocks must be from 1 to 5, got 0'),
        (dict(num_blocks=6), r'num_blocks must be from 1 to 5, got 6'),
        (dict(num_queries=0), r'must be 1 or more, got 0, 4'),
        (dict(arch='huge'), 'huge'),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        QueryDecoder(**{**dict(num_classes=4, arch=VIT), **arguments})


def test_out_prefix_needs_maps():
    with pytest.raises(ValueError, match="out_prefix needs out_type='map', got 'cls_token'"):
        MSViT(VIT, out_type='cls_token', out_prefix=True)
