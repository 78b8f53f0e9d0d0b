"""What is MergeViT's own; for what all backbones promise see the contract suites."""

import pytest
import torch
from families import VIT
from helpers import needs_tracing, wake
from timm.models.vision_transformer import VisionTransformer

import mmtoken
from mmtoken.backbones import MergeViT
from mmtoken.checkpoints import load_into
from mmtoken.layers.merge.mutual_pairs import merge_mutual_pairs, unmerge, unmerged_layout


def images(batch=1, height=96, width=128):
    return torch.randn(batch, 3, height, width)


def timm_vit(**kwargs):
    return VisionTransformer(
        img_size=224, patch_size=16, embed_dim=32, depth=6, num_heads=2, mlp_ratio=1.5,
        num_classes=10, **kwargs,
    )  # fmt: skip


@pytest.mark.parametrize('merge_blocks', [(2, 4), (0,), (5,)])
@pytest.mark.parametrize('proportional', [True, False])
def test_equals_timm_with_merges_between_the_blocks(merge_blocks, proportional):
    """One image, block by block; attention written out."""
    ours = wake(
        MergeViT(VIT, merge_blocks=merge_blocks, proportional=proportional, cls_token=True)
    ).eval()
    theirs = timm_vit().eval()
    theirs.load_state_dict(ours.state_dict(), strict=False)
    image = images(height=224, width=224)
    with torch.no_grad():
        x = theirs._pos_embed(theirs.patch_embed(image))
        layout = unmerged_layout((14, 14), 1, 1, x.device)
        for i, block in enumerate(theirs.blocks):
            if i in merge_blocks:
                merged, layout = merge_mutual_pairs(x[0], layout)
                x = merged[None]
            qkv = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
            scores = qkv[0] @ qkv[1].transpose(-2, -1) * 16**-0.5
            if proportional:
                scores = scores + layout.sizes.log()
            attended = (scores.softmax(dim=-1) @ qkv[2]).transpose(1, 2).flatten(2)
            x = x + block.attn.proj(attended)
            x = x + block.mlp(block.norm2(x))
        expected = unmerge(theirs.norm(x)[0], layout)[:, 1:].transpose(1, 2).unflatten(2, (14, 14))
        torch.testing.assert_close(ours(image)[0], expected, atol=1e-4, rtol=1e-4)
    assert len(x[0]) < 197


def test_the_twin_is_vit():
    cfg = mmtoken.dense_twin(dict(type='mmtoken.MergeViT', arch=VIT))
    assert cfg['merge_blocks'] == ()
    twin, theirs = wake(MergeViT(VIT, merge_blocks=())).eval(), timm_vit().eval()
    theirs.load_state_dict(twin.state_dict(), strict=False)
    image = images(height=224, width=224)
    with torch.no_grad():
        expected = theirs.forward_features(image)[:, 1:].transpose(1, 2).unflatten(2, (14, 14))
        torch.testing.assert_close(twin(image)[0], expected, atol=1e-4, rtol=1e-4)


def test_twins_have_the_same_parameters():
    shapes = [
        {name: p.shape for name, p in MergeViT(VIT, merge_blocks=blocks).named_parameters()}
        for blocks in ((2, 4), ())
    ]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    'name, kwargs',
    [
        ('timm', {}),
        ('deit', {}),
        ('mae', {}),
        ('dinov2', dict(layer_scale=1e-5)),
        ('registers', dict(layer_scale=1e-5, num_registers=4)),
        ('mmpretrain', {}),
    ],
)
def test_weights_of_a_plain_vit(name, kwargs, tmp_path):
    """As each library names them; the reader does not know of this backbone."""
    torch.manual_seed(1)
    source = wake(MergeViT(VIT, merge_blocks=(), **kwargs))
    state = dict(source.state_dict())
    if name in ('timm', 'deit', 'mae'):
        state['head.weight'], state['head.bias'] = torch.zeros(10, 32), torch.zeros(10)
    if name == 'mae':
        state['mask_token'] = torch.zeros(1, 1, 32)
        state['decoder_embed.weight'] = torch.zeros(8, 32)
    if name in ('dinov2', 'registers'):
        state['mask_token'] = torch.zeros(1, 32)
    if name == 'registers':
        state['register_tokens'] = state.pop('reg_token')
    if name == 'mmpretrain':
        renames = {
            'patch_embed.proj.': 'patch_embed.projection.', 'blocks.': 'layers.',
            '.norm1.': '.ln1.', '.norm2.': '.ln2.',
            '.mlp.fc1.': '.ffn.layers.0.0.', '.mlp.fc2.': '.ffn.layers.1.',
        }  # fmt: skip
        for old, new in renames.items():
            state = {key.replace(old, new): value for key, value in state.items()}
        state = {'backbone.' + key.replace('norm.', 'ln1.'): v for key, v in state.items()}
    torch.save(state, tmp_path / 'weights.pth')
    model = MergeViT(VIT, merge_blocks=(2, 4), **kwargs)
    load_into(model, tmp_path / 'weights.pth')
    for key, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


@pytest.mark.parametrize('out_type', ['map', 'cls_token', 'avg_featmap'])
def test_outputs(out_type):
    """Of one merge before the last block, from its layout."""
    model = wake(MergeViT(VIT, merge_blocks=-1, out_type=out_type)).eval()
    with torch.no_grad():
        (out,) = model(images(2))
    assert out.shape == ((2, 32, 6, 8) if out_type == 'map' else (2, 32))
    if out_type == 'avg_featmap':
        model.out_type = 'map'
        torch.manual_seed(0)
        image = images(2)
        with torch.no_grad():
            map_ = model(image)[0]
            model.out_type = out_type
            torch.testing.assert_close(model(image)[0], map_.mean(dim=(2, 3)))


def test_places_of_a_pair_have_one_value():
    """A map from behind a merge has fewer different vectors than places, one from before all."""
    model = wake(MergeViT(VIT, merge_blocks=3, out_indices=(2, 3, 5))).eval()
    with torch.no_grad():
        counts = [len(map_[0].flatten(1).unique(dim=1).T) for map_ in model(images())]
    assert counts[0] == 48 and 24 <= counts[1] == counts[2] < 48


def test_images_of_a_batch_keep_different_numbers(monkeypatch):
    seen = []

    def watch(tokens, layout, least):
        tokens, layout = merge_mutual_pairs(tokens, layout, least)
        seen.append(layout.lengths)
        return tokens, layout

    monkeypatch.setattr('mmtoken.backbones.merge_vit.merge_mutual_pairs', watch)
    model, batch = wake(MergeViT(VIT, merge_blocks=(1, 3))).eval(), images(3)
    with torch.no_grad():
        together = model(batch)[0]
        assert len(set(seen[0])) > 1 and all(a > b for a, b in zip(*seen, strict=True))
        for image, expected in zip(batch, together, strict=True):
            torch.testing.assert_close(model(image[None])[0][0], expected, atol=1e-5, rtol=1e-5)


def test_pairs_are_found_once_with_checkpointing(monkeypatch):
    calls = []

    def watch(tokens, layout, least):
        calls.append(len(tokens))
        return merge_mutual_pairs(tokens, layout, least)

    monkeypatch.setattr('mmtoken.backbones.merge_vit.merge_mutual_pairs', watch)
    model = MergeViT(VIT, merge_blocks=(1, 3), with_cp=True).train()
    model(images(2))[0].sum().backward()
    assert len(calls) == 2


@pytest.mark.parametrize('merge_blocks', [6, (-7,), (1, 99)])
def test_blocks_that_do_not_exist(merge_blocks):
    with pytest.raises(ValueError, match='merge_blocks must be from -6 to 5'):
        MergeViT(VIT, merge_blocks=merge_blocks)


@needs_tracing
def test_compiled():
    model, image = wake(MergeViT(VIT, merge_blocks=(1, 3))).eval(), images(2)
    with torch.no_grad():
        expected = model(image)[0]
        compiled = torch.compile(model, backend='eager')(image)[0]
    torch.compiler.reset()
    torch.testing.assert_close(compiled, expected, atol=1e-5, rtol=1e-5)
