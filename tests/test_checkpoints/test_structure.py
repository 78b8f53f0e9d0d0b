"""Structured backbones that start from plain weights: block by block they compute the same."""

import mmseg.models.backbones.swin as mmseg_swin
import pytest
import torch
import torch.nn.functional as F
from mmpretrain.models.backbones import VisionTransformer as MMPretrainViT
from mmseg.models.backbones import VisionTransformer as MMSegViT
from timm.models.deit import VisionTransformerDistilled
from timm.models.swin_transformer import SwinTransformer as TimmSwin
from timm.models.vision_transformer import VisionTransformer as TimmViT

from mmtoken.backbones.swat_deit import SWATDeiT
from mmtoken.backbones.swat_swin import SWATSwin
from mmtoken.checkpoints import Report, fit_to, load_into
from mmtoken.checkpoints.structure import LIFT, structure_layers
from mmtoken.runtime.reference import reference_path

from .test_sources.test_swin import to_microsoft

DEPTHS, HEADS = (2, 1, 2, 2), (1, 2, 4, 8)
SWIN = dict(embed_dims=32, depths=DEPTHS, num_heads=HEADS)
VIT = dict(embed_dims=32, num_layers=3, num_heads=2, feedforward_channels=64)
DEIT = dict(VIT, patch_size=16, mlp_kernel=5)
STEM = {
    f'patch_embed.{layer}.{kind}' for layer in ('conv1', 'conv2') for kind in ('weight', 'bias')
}
STEM_NORMS = {f'patch_embed.norm{i}.{kind}' for i in (1, 2) for kind in ('weight', 'bias')}
MERGING = {
    f'layers.{i}.downsample.{p}'
    for i in range(3)
    for p in ('norm.weight', 'norm.bias', 'reduction.weight')
}
OUTPUT_NORMS = {f'norm{i}.{kind}' for i in range(4) for kind in ('weight', 'bias')}


def settle(model):
    """Weights as large as trained ones, so that rounding shows what it is."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 1.5 * parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else 0.3
            center = 1.0 if 'norm' in name and name.endswith('weight') else 0.0
            parameter.normal_(center, scale)
    model.eval()
    return model


def swat_swin(**kwargs):
    return SWATSwin(SWIN, drop_path_rate=0.0, **kwargs).eval()


def swat_deit(**kwargs):
    return SWATDeiT(**{**dict(arch=DEIT, plane_size=4, img_size=64), **kwargs}).eval()


def assert_same(ours, theirs, x, theirs_x=None):
    """Values and gradients of two blocks, by each path."""
    theirs_x = x if theirs_x is None else theirs_x
    with torch.no_grad():
        expected = theirs(theirs_x).view_as(x)
        torch.testing.assert_close(ours(x), expected, atol=1e-5, rtol=1e-5)
        with reference_path():
            torch.testing.assert_close(ours(x), expected, atol=1e-5, rtol=1e-5)
    gradients = []
    for block, start in ((ours.train(), x), (theirs.train(), theirs_x)):
        start = start.clone().requires_grad_()
        block(start).square().mean().backward()
        gradients.append(start.grad.view_as(x))
        block.eval()
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-5)


def swin_files():
    """Weights of a plain Swin by each project's names, and our dense twin with them."""
    theirs = settle(TimmSwin(embed_dim=32, depths=DEPTHS, num_heads=HEADS, num_classes=3))
    state = theirs.state_dict()
    return {'timm': state, 'Microsoft': to_microsoft(state)}


def openmmlab_swin():
    model = mmseg_swin.SwinTransformer(embed_dims=32, depths=DEPTHS, num_heads=HEADS)
    return settle(model).state_dict()


@pytest.mark.parametrize('names', ['timm', 'Microsoft', 'OpenMMLab', 'own'])
def test_swin(names, save):
    """Every block, on grids of whole windows, with padding, and no larger than a window."""
    if names == 'own':
        file = settle(swat_swin(structured=False)).state_dict()
    else:
        file = openmmlab_swin() if names == 'OpenMMLab' else swin_files()[names]
    file, ours, twin = save(dict(state_dict=file)), swat_swin(), swat_swin(structured=False)
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    report = load_into(ours, file)
    load_into(twin, file)
    assert report.origin == f'swin ({"Microsoft" if names == "own" else names} names)'

    left = STEM | STEM_NORMS | MERGING
    has_norms = names in ('OpenMMLab', 'own')
    assert set(report.newly_initialized) == (left if has_norms else left | OUTPUT_NORMS)
    assert all(
        torch.equal(before[name], ours.state_dict()[name]) for name in report.newly_initialized
    )
    assert set(report.identity_init) == {n for n in before if '.conv.' in n or '.dwconv.' in n}
    assert sum('downsample' in name for name in report.dropped) == 9
    assert sum(name.startswith('patch_embed.') for name in report.dropped) == 4

    torch.manual_seed(0)
    for ours_stage, stage in zip(ours.layers, twin.layers, strict=True):
        for ours_block, block in zip(ours_stage.blocks, stage.blocks, strict=True):
            dims = block.norm1.normalized_shape[0]
            for grid in ((14, 14), (9, 16), (5, 3)):
                assert_same(ours_block, block, torch.randn(2, *grid, dims))


def plain_vit(library):
    if library == 'timm':
        return TimmViT(64, embed_dim=32, depth=3, num_heads=2, mlp_ratio=2, num_classes=3)
    if library == 'distilled':
        return VisionTransformerDistilled(64, embed_dim=32, depth=3, num_heads=2, mlp_ratio=2)
    if library == 'mmpretrain':
        return MMPretrainViT(VIT, img_size=64)
    if library == 'mmseg':
        return MMSegViT(
            64, embed_dims=32, num_layers=3, num_heads=2, mlp_ratio=2, out_indices=2,
            qkv_bias=True, patch_bias=True, final_norm=True, norm_cfg=dict(type='LN', eps=1e-6),
        )  # fmt: skip
    return swat_deit(structured=False)


@pytest.mark.parametrize('library', ['timm', 'distilled', 'mmpretrain', 'mmseg', 'own'])
@pytest.mark.parametrize('img_size', [64, (96, 160)])
def test_vit(library, img_size, save):
    file = save(settle(plain_vit(library)).state_dict())
    ours, twin = (swat_deit(img_size=img_size, structured=s) for s in (True, False))
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    report = load_into(ours, file)
    load_into(twin, file)
    layout = 'timm' if library in ('distilled', 'own') else library
    assert report.origin == f'{"deit" if library == "distilled" else "vit"} ({layout} names)'

    assert set(report.newly_initialized) == STEM | {'patch_embed.plane_pos'}
    assert all(
        torch.equal(before[name], ours.state_dict()[name]) for name in report.newly_initialized
    )
    assert set(report.identity_init) == {n for n in before if '.conv.' in n or '.dwconv.' in n}
    own_layer = 'projection' if library in ('mmpretrain', 'mmseg') else 'proj'
    assert f'patch_embed.{own_layer}.weight' in report.dropped
    assert ('cls_token' in report.dropped) == (library != 'own')
    assert torch.equal(ours.pos_embed, twin.pos_embed)

    torch.manual_seed(0)
    for grid in ((4, 4), (7, 3)):
        for ours_block, block in zip(ours.blocks, twin.blocks, strict=True):
            x = torch.randn(2, *grid, 32)
            assert_same(ours_block, block, x, x.flatten(1, 2))


def test_blocks_are_those_of_timm(save):
    theirs, ours = settle(plain_vit('timm')), swat_deit()
    load_into(ours, save(theirs.state_dict()))
    x = torch.randn(2, 4, 4, 32)
    for ours_block, block in zip(ours.blocks, theirs.blocks, strict=True):
        assert_same(ours_block, block, x, x.flatten(1, 2))


def test_the_inner_gelu_changes_nothing():
    h = torch.linspace(-50, 50, 400_001, dtype=torch.float64)
    lifted = F.gelu(F.gelu(h + LIFT) - LIFT)
    torch.testing.assert_close(lifted, F.gelu(h), atol=7e-8, rtol=0)


def test_convolutions_are_not_dead(save):
    """They start without effect, and learn."""
    ours = swat_deit()
    load_into(ours, save(settle(plain_vit('timm')).state_dict()))
    ours(torch.randn(1, 3, 64, 64))[0].square().mean().backward()
    for name, parameter in ours.named_parameters():
        if '.conv.' in name or '.dwconv.' in name:
            assert parameter.grad.abs().max() > 1e-6, name


def test_files_of_half_precision_are_lifted_in_full(save):
    """A lifted bias in the file's precision would lose its last digits."""
    state = settle(plain_vit('timm')).half().state_dict()
    ours = swat_deit()
    load_into(ours, save(state))
    bias = state['blocks.0.mlp.fc1.bias'].float()
    torch.testing.assert_close(ours.blocks[0].mlp.fc1.bias - LIFT, bias, atol=1e-6, rtol=0)


def test_bfloat16(save):
    """The lift costs digits there, but not more than the docstring says."""
    theirs, ours = settle(plain_vit('timm')), swat_deit()
    load_into(ours, save(theirs.state_dict()))
    x = torch.randn(4, 64, 32)
    for ours_block, block in zip(ours.blocks, theirs.blocks, strict=True):
        with torch.no_grad():
            change = block.mlp(x)
            with torch.autocast('cpu', torch.bfloat16):
                actual = ours_block.mlp(x.unflatten(1, (8, 8))).flatten(1, 2)
        assert (actual - change).norm() / change.norm() < 0.06


def test_without_bias(save):
    theirs = settle(TimmViT(64, embed_dim=32, depth=3, num_heads=2, mlp_ratio=2, qkv_bias=False))
    ours = swat_deit(qkv_bias=False)
    report = load_into(ours, save(theirs.state_dict()))
    assert 'blocks.0.attn.qkv.conv.weight' in report.identity_init
    x = torch.randn(2, 4, 4, 32)
    assert_same(ours.blocks[1], theirs.blocks[1], x, x.flatten(1, 2))


def test_what_does_not_fit_is_refused(save):
    narrow, wide = settle(plain_vit('timm')).state_dict(), dict(DEIT, feedforward_channels=128)
    with pytest.raises(ValueError, match=r'other shapes: blocks\.0\.mlp\.fc1\.weight \(64, 32\)'):
        load_into(swat_deit(arch=wide), save(narrow))
    with pytest.raises(ValueError, match=r'names it lacks: .*blocks\.1\.attn\.qkv\.linear\.weight'):
        state = {k: v for k, v in narrow.items() if k != 'blocks.1.attn.qkv.weight'}
        load_into(swat_deit(), save(state))
    state = swin_files()['Microsoft']
    del state['layers.1.downsample.norm.weight']
    load_into(swat_swin(), save(state))  # which it does not use
    with pytest.raises(ValueError, match=r'names it lacks: layers\.1\.downsample\.norm\.weight'):
        load_into(swat_swin(structured=False), save(state))


def test_merging_of_planes_may_not_be_missing(save):
    """Only plain weights leave it to the model."""
    state = swat_swin().state_dict()
    del state['layers.0.downsample.reduction.weight']
    with pytest.raises(ValueError, match=r'lacks: layers\.0\.downsample\.reduction\.weight'):
        load_into(swat_swin(), save(state))


def test_models_without_values_take_them_too():
    """As tools/convert_checkpoint.py builds them."""
    with torch.device('meta'):
        model = SWATDeiT(DEIT, plane_size=4, img_size=64)
    state, report = fit_to(model, settle(plain_vit('timm')).state_dict(), 'a.pth')
    assert not any(tensor.is_meta for tensor in state.values())
    assert set(state) | set(report.newly_initialized) == set(model.state_dict())


def test_plain_models_are_left_alone():
    twin = swat_swin(structured=False).state_dict()
    state, report = dict(twin), Report(mapped={name: name for name in twin})
    structure_layers(state, twin, report)
    assert all(state[name] is twin[name] for name in twin)
    assert report == Report(mapped={name: name for name in twin})
