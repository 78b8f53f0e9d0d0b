"""Plain Swin of other libraries, by what the models compute."""

import mmpretrain.models.backbones.swin_transformer as mmpretrain_swin
import mmseg.models.backbones.swin as mmseg_swin
import pytest
import timm
import torch
import torch.nn.functional as F
from mmdet.models.backbones.swin import SwinTransformer as MMDetSwin
from timm.models.swin_transformer import SwinTransformer as TimmSwin

from mmtoken.backbones import STViTRSwin
from mmtoken.checkpoints import convert, detect_source, load_into

DEPTHS, HEADS = (2, 1, 2, 2), (1, 2, 2, 4)
ARCH = dict(embed_dims=16, depths=DEPTHS, num_heads=HEADS)
SEMANTIC = dict(ARCH, depths=(2, 1, 6, 2))
PLAIN = dict(semantic_size=None, stem='patch', drop_path_rate=0.0)


def openmmlab(name):
    if name == 'mmpretrain':
        return mmpretrain_swin.SwinTransformer(ARCH, out_indices=range(4), drop_path_rate=0.0)
    kind = dict(mmdet=MMDetSwin, mmseg=mmseg_swin.SwinTransformer)[name]
    return kind(embed_dims=16, depths=DEPTHS, num_heads=HEADS, drop_path_rate=0.0)


def timm_swin(**kwargs):
    return TimmSwin(embed_dim=16, depths=DEPTHS, num_heads=HEADS, num_classes=3, **kwargs)


def to_microsoft(state):
    """timm's names to Microsoft's, which no installed library has."""
    renamed = {}
    for name, tensor in state.items():
        parts = name.split('.')
        if 'downsample' in parts:
            parts[1] = str(int(parts[1]) - 1)
        renamed['.'.join(parts).replace('head.fc', 'head')] = tensor
    masks = {'layers.0.blocks.1.attn_mask': torch.zeros(64, 49, 49)}
    index = {'layers.0.blocks.0.attn.relative_position_index': torch.zeros(49, 49)}
    return {**renamed, **masks, **index}


def assert_equal(maps, expected):
    assert len(maps) == len(expected) == 4
    for actual, wanted in zip(maps, expected, strict=True):
        torch.testing.assert_close(actual, wanted, atol=1e-4, rtol=1e-4)


def normalise(map_):
    """A fresh LayerNorm over the channels."""
    return F.layer_norm(map_.permute(0, 2, 3, 1), map_.shape[1:2]).permute(0, 3, 1, 2)


@pytest.mark.parametrize('library', ['mmdet', 'mmseg', 'mmpretrain'])
@pytest.mark.parametrize('wrap', ['backbone', 'detector'])
def test_openmmlab(library, wrap, wake, save):
    theirs = wake(openmmlab(library))
    assert detect_source(theirs.state_dict()) == 'swin'
    state = theirs.state_dict()
    if wrap == 'detector':
        state = {f'backbone.{name}': tensor for name, tensor in state.items()}
        state['head.fc.weight'] = torch.zeros(1)
    form = 'classification' if library == 'mmpretrain' else 'dense'
    ours = STViTRSwin(ARCH, form, **PLAIN).eval()
    report = load_into(ours, save(dict(state_dict=state)))
    assert report.origin == 'swin (OpenMMLab names)' and report.newly_initialized == []
    # mmpretrain refuses grids that are smaller than a window.
    for size in [(224, 224)] if library == 'mmpretrain' else [(224, 224), (97, 130), (20, 64)]:
        image = torch.randn(1, 3, *size)
        with torch.no_grad():
            assert_equal(ours(image), theirs(image))


@pytest.mark.parametrize('names', ['timm', 'Microsoft'])
def test_timm_and_microsoft(names, wake, save):
    theirs = wake(timm_swin())
    state = theirs.state_dict()
    if names == 'Microsoft':
        state = to_microsoft(state)
    assert detect_source(state) == 'swin'
    ours = STViTRSwin(ARCH, 'classification', **PLAIN).eval()
    report = load_into(ours, save(dict(model=state, epoch=300)))
    assert report.origin == f'swin ({names} names)'
    assert (
        all(name.startswith('norm') for name in report.newly_initialized)
        and len(report.newly_initialized) == 8
    )
    image = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        maps = theirs.forward_intermediates(image, intermediates_only=True)
        assert_equal(ours(image), [normalise(map_) for map_ in maps])


def test_classifier_keeps_its_output_norm(wake, save):
    theirs = wake(timm_swin())
    ours = STViTRSwin(ARCH, 'classification', out_indices=(3,), **PLAIN).eval()
    assert load_into(ours, save(theirs.state_dict())).newly_initialized == []
    image = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        features = theirs.forward_features(image).permute(0, 3, 1, 2)
        torch.testing.assert_close(ours(image)[0], features, atol=1e-4, rtol=1e-4)


def test_every_timm_swin_is_recognised():
    with torch.device('meta'):
        names = list(timm.create_model('swin_tiny_patch4_window7_224').state_dict())
    assert detect_source(names) == 'swin'
    assert detect_source(to_microsoft(dict.fromkeys(names))) == 'swin'


@pytest.mark.parametrize('names', ['timm', 'OpenMMLab'])
def test_convert_is_only_a_renaming(names):
    state = timm_swin().state_dict() if names == 'timm' else openmmlab('mmdet').state_dict()
    converted, report = convert(state, 'swin')
    assert report.layout == names and set(converted) == set(report.mapped)
    for ours, theirs in report.mapped.items():
        assert converted[ours].shape == state[theirs].shape
        if 'downsample' not in ours or names == 'timm':
            assert converted[ours] is state[theirs]
    assert set(report.mapped.values()).isdisjoint(report.dropped)
    assert set(report.mapped.values()) | set(report.dropped) == set(state)


def test_merged_patches_are_reordered_by_the_rule():
    state = openmmlab('mmdet').state_dict()
    converted, _ = convert(state, 'swin')
    theirs, ours = (
        weights[f'{stages}.0.downsample.reduction.weight']
        for weights, stages in ((state, 'stages'), (converted, 'layers'))
    )
    channels = 16
    for c in range(channels):
        for i in range(2):
            for j in range(2):
                old, new = 4 * c + 2 * i + j, (2 * j + i) * channels + c
                assert torch.equal(theirs[:, old], ours[:, new])


# Warm start of semantic blocks


@pytest.mark.parametrize('form', ['dense', 'classification'])
@pytest.mark.parametrize('stem', ['patch', 'conv'])
@pytest.mark.parametrize('extras', [{}, dict(use_global=True, conv_pos=True)])
def test_semantic_backbone(form, stem, extras, save):
    theirs = TimmSwin(embed_dim=16, depths=SEMANTIC['depths'], num_heads=HEADS).state_dict()
    ours = STViTRSwin(SEMANTIC, form, stem=stem, **extras)
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    report = load_into(ours, save(theirs))

    fresh = {name.split('.')[-1] for name in report.newly_initialized if name.startswith('layers.')}
    assert fresh == {'layer_scale_1', 'layer_scale_2'} | (
        {'semantic_token2'} | {'weight', 'bias'} if extras else set()
    )
    assert {n for n in before if n.startswith('patch_embed.')} <= set(
        report.newly_initialized if stem == 'conv' else report.mapped
    )
    assert all(
        torch.equal(before[name], ours.state_dict()[name]) for name in report.newly_initialized
    )
    assert len(report.split) == 10
    tables = [n for n in report.dropped if n.endswith('relative_position_bias_table')]
    assert tables == [f'layers.2.blocks.{i}.attn.relative_position_bias_table' for i in range(1, 6)]
    for kind in ('weight', 'bias'):
        block, joint = ours.layers[2].blocks[3].attn, theirs[f'layers.2.blocks.3.attn.qkv.{kind}']
        assert torch.equal(torch.cat([getattr(block.q, kind), getattr(block.kv, kind)]), joint)


def test_only_semantic_parts_may_be_missing(save):
    state = timm_swin().state_dict()
    del state['layers.2.blocks.0.attn.qkv.weight']
    with pytest.raises(ValueError, match=r'lacks: layers\.2\.blocks\.0\.attn\.qkv\.weight'):
        load_into(STViTRSwin(ARCH, **PLAIN), save(state))


def test_patch_stem_is_not_optional(save):
    state = {k: v for k, v in timm_swin().state_dict().items() if not k.startswith('patch_embed.')}
    with pytest.raises(ValueError, match=r'lacks: patch_embed\.proj\.weight'):
        load_into(STViTRSwin(ARCH, **PLAIN), save(state))


# Variants


def test_other_window_as_in_timm(save):
    state = timm_swin(img_size=256, window_size=8).state_dict()
    ours = STViTRSwin(ARCH, **PLAIN)
    report = load_into(ours, save(state))
    assert len(report.resized) == sum(DEPTHS)
    for name, shapes in report.resized.items():
        heads = shapes[1][1]
        assert name.endswith('relative_position_bias_table')
        assert shapes == ((225, heads), (169, heads))
        expected = timm.layers.resize_rel_pos_bias_table(state[name], (7, 7), shapes[1])
        assert torch.equal(ours.state_dict()[name], expected)


def test_resized_tables_are_smooth(save):
    """Of a table that is linear in the row, whatever the scale."""
    model = timm_swin(img_size=256, window_size=8)
    for name, table in model.state_dict().items():
        if name.endswith('relative_position_bias_table'):
            table.copy_(torch.linspace(-1, 1, 15).repeat_interleave(15)[:, None])
    ours = STViTRSwin(ARCH, **PLAIN)
    load_into(ours, save(model.state_dict()))
    table = ours.layers[0].blocks[0].attn.relative_position_bias_table[:, 0].view(13, 13)
    assert table.std(dim=1).max() < 1e-5 and table[6].abs().max() < 1e-5
    assert (table.diff(dim=0) > 0).all()


def test_unsupported_variants(save):
    version_2 = timm.models.swin_transformer_v2.SwinTransformerV2(
        embed_dim=16, depths=DEPTHS, num_heads=HEADS
    ).state_dict()
    absolute = dict(timm_swin().state_dict(), absolute_pos_embed=torch.zeros(1, 3136, 16))
    for state, part in ((version_2, 'logit_scale'), (absolute, 'absolute_pos_embed')):
        with pytest.raises(ValueError, match=f'not supported; it has .*{part}'):
            convert(state, 'swin')
        with pytest.raises(ValueError, match=f'it should not have: .*{part}'):
            load_into(STViTRSwin(ARCH, **PLAIN), save(state))


def test_other_widths_are_listed(save):
    with pytest.raises(
        ValueError, match=r'other shapes: .*\(16,\) instead of \(32,\).*and \d+ more'
    ):
        load_into(STViTRSwin(dict(ARCH, embed_dims=32), **PLAIN), save(timm_swin().state_dict()))
