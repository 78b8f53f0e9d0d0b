"""Plain PVT, as released and in mmdet."""

import re
import sys

import convert_checkpoint
import pytest
import torch
from mmdet.models.backbones.pvt import (
    PyramidVisionTransformer,
    PyramidVisionTransformerV2,
    pvt_convert,
)
from timm.layers import resample_abs_pos_embed

from mmtoken.backbones import DGEDPVT, DGEPVT, STViTRSwin
from mmtoken.checkpoints import convert, detect_source, fit_to, load_into

from ..conftest import dge_weights

HEADS, DEPTHS, RATIOS = (1, 2, 2, 4), (1, 2, 1, 1), (2, 2, 2, 2)
WIDTHS = tuple(16 * heads for heads in HEADS)
ARCH = dict(
    embed_dims=WIDTHS, depths=DEPTHS, num_heads=HEADS, mlp_ratios=RATIOS, sr_ratios=(8, 4, 2, 1)
)
ROUTERS = {
    f'layers.{i}.blocks.{j}.router.gate.{kind}'
    for i, depth in enumerate(DEPTHS)
    for j in range(depth)
    for kind in ('weight', 'bias')
}


def build(**kwargs):
    return DGEPVT(**{**dict(arch=ARCH, pretrain_img_size=64, budget=None), **kwargs})


def mmdet_pvt(img_size=64, cls=PyramidVisionTransformer, **kwargs):
    return cls(
        **{
            **dict(pretrain_img_size=img_size, embed_dims=16, num_layers=DEPTHS, num_heads=HEADS),
            **dict(mlp_ratios=RATIOS, drop_path_rate=0.0),
            **kwargs,
        }
    )


def equal_eps(model):
    """mmdet has 1e-6 in all norms, the official code and ours in some."""
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-6
    return model


def official(img_size=64, cls_token=True):
    """Random weights with the official names; a detector's have no class token, nor a norm."""
    model = build(granularities=(1,), cls_token=True, pretrain_img_size=img_size)
    state = {}
    for name, tensor in model.state_dict().items():
        name = re.sub(r'layers\.(\d)\.', lambda found: f'layers.{int(found[1]) + 1}.', name)
        name = re.sub(r'layers\.(\d)\.(pos_embed|patch_embed)', r'\2\1', name)
        name = re.sub(r'layers\.(\d)\.blocks', r'block\1', name).replace('layers.4.cls', 'cls')
        state[name] = torch.randn_like(tensor)
    if cls_token:
        state.update({f'norm.{kind}': torch.randn(WIDTHS[-1]) for kind in ('weight', 'bias')})
        state['head.weight'] = torch.randn(3, WIDTHS[-1])
    else:
        del state['cls_token']
    return state


def resized(position, side, new):
    if side == new[0] == new[1]:
        return position
    return resample_abs_pos_embed(
        position, new, (side, side), num_prefix_tokens=0, interpolation='bilinear', antialias=False
    )


def plain_weights():
    """The released PVT-S by the table."""
    return {n: t for n, t in dge_weights('pvt-dge').items() if '.dge.' not in n}


def test_released_names():
    weights = plain_weights()
    assert len(weights) == 301 and detect_source(weights) == 'pvt'
    with torch.device('meta'):
        model = DGEPVT(pretrain_img_size=256, cls_token=True, budget=None)
        plain = DGEPVT(granularities=(1,), pretrain_img_size=256, cls_token=True)
    state, report = fit_to(model, weights, 'a.pth')
    assert report.origin == 'pvt (official names)'
    assert set(report.dropped) == {'norm.weight', 'norm.bias', 'head.weight', 'head.bias'}
    assert not report.resized and not report.split
    assert len(report.newly_initialized) == 32 and all(
        '.router.gate.' in name for name in report.newly_initialized
    )
    assert set(state) == set(plain.state_dict()) == set(report.mapped)
    for ours, theirs in report.mapped.items():
        assert torch.equal(state[ours], weights[theirs])
        assert state[ours].shape == model.state_dict()[ours].shape
    for ours, theirs in (
        ('layers.0.patch_embed.proj.weight', 'patch_embed1.proj.weight'),
        ('layers.1.blocks.3.attn.sr.bias', 'block2.3.attn.sr.bias'),
        ('layers.2.blocks.5.mlp.fc1.weight', 'block3.5.mlp.fc1.weight'),
        ('layers.3.pos_embed', 'pos_embed4'),
        ('layers.3.cls_token', 'cls_token'),
    ):
        assert report.mapped[ours] == theirs


def test_convert_is_only_a_renaming():
    state = official()
    converted, report = convert(state, 'pvt')
    assert set(converted) == set(build(granularities=(1,), cls_token=True).state_dict()) | {
        'norm.weight',
        'norm.bias',
    }
    assert all(converted[ours] is state[theirs] for ours, theirs in report.mapped.items())
    assert report.dropped == ['head.weight'] and not report.resized


@pytest.mark.parametrize('granularities', [(1,), (1, 2, 4)])
@pytest.mark.parametrize('wrap', ['backbone', 'detector'])
def test_mmdet(granularities, wrap, wake, save):
    """A router that has learned nothing leaves every region at its finest, where DGE is PVT."""
    theirs = equal_eps(wake(mmdet_pvt()))
    state = theirs.state_dict()
    assert detect_source(state) == 'pvt'
    if wrap == 'detector':
        state = {f'backbone.{name}': tensor for name, tensor in state.items()}
        state['neck.conv.weight'] = torch.zeros(1)
    ours = equal_eps(build(granularities=granularities)).eval()
    report = load_into(ours, save(dict(state_dict=state)))
    assert report.origin == 'pvt (mmdet names)' and not report.resized
    assert set(report.newly_initialized) == (ROUTERS if len(granularities) > 1 else set())
    assert len(report.split) == 2 * sum(DEPTHS)
    if len(granularities) > 1:
        for name, tensor in ours.state_dict().items():
            if name.endswith('gate.weight'):
                tensor.zero_()
    for size in [(64, 64), (96, 160)]:
        image = torch.randn(2, 3, *size)
        with torch.no_grad():
            for actual, expected in zip(ours(image), theirs(image), strict=True):
                scale = expected.abs().max().item()
                torch.testing.assert_close(actual, expected, atol=1e-5 * scale, rtol=0)


def test_agrees_with_the_converter_of_mmdet():
    """Which strips the class token's position at 224 pixels alone."""
    state = official(img_size=224)
    direct, _ = fit_to(build(pretrain_img_size=224), state, 'a.pth')
    model = mmdet_pvt(img_size=224)
    model.load_state_dict(pvt_convert(state), strict=False)
    through_mmdet, _ = fit_to(build(pretrain_img_size=224), model.state_dict(), 'b.pth')
    assert direct.keys() == through_mmdet.keys()
    assert all(torch.equal(direct[name], through_mmdet[name]) for name in direct)


# Position embeddings, and the class token in the last


@pytest.mark.parametrize('cls_token', [True, False])
@pytest.mark.parametrize('kind', ['classifier', 'detector', 'mmdet'])
@pytest.mark.parametrize('old, new', [(64, 64), (256, 64), (224, (256, 320)), (256, (160, 320))])
def test_positions(kind, cls_token, old, new, save):
    """Any grid of squares; at (160, 320) pixels there are as many tokens as in 7 x 7 with one."""
    if kind == 'mmdet':
        state = mmdet_pvt(old).state_dict()
        positions = [state[f'layers.{i}.1.0.pos_embed'].normal_() for i in range(4)]
    else:
        state = official(old, cls_token=kind == 'classifier')
        positions = [state[f'pos_embed{i}'] for i in range(1, 5)]
    slot = positions[3][:, :0] if kind == 'mmdet' else positions[3][:, :1]
    positions[3] = positions[3][:, slot.shape[1] :]
    ours = build(cls_token=cls_token, pretrain_img_size=new)
    report = load_into(ours, save(state))
    for i, position in enumerate(positions):
        grid = ours.layers[i].pos_grid
        expected = resized(position, old // (4 * 2**i), grid)
        actual = ours.layers[i].pos_embed.detach()
        if i == 3 and cls_token:
            first, actual = actual[:, :1], actual[:, 1:]
            wanted = slot if kind == 'classifier' else torch.zeros(1, 1, WIDTHS[-1])
            assert torch.equal(first, wanted)
        torch.testing.assert_close(actual, expected)
    fresh = {'layers.3.cls_token'} if cls_token and kind != 'classifier' else set()
    assert set(report.newly_initialized) == ROUTERS | fresh
    assert ('cls_token' in report.dropped) == (kind == 'classifier' and not cls_token)


def test_resized_as_the_backbone_does(save):
    """Positions come to the image's grid on loading, or when there is an image."""
    state = {name: 0.2 * tensor for name, tensor in official().items()}
    before, later = (build(granularities=(1,), pretrain_img_size=size).eval() for size in (96, 64))
    for model in (before, later):
        load_into(model, save(state))
    image = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        for actual, expected in zip(before(image), later(image), strict=True):
            torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def test_grid_that_is_not_square_is_refused(save):
    state = official()
    state['pos_embed2'] = torch.zeros(1, 96, WIDTHS[1])
    with pytest.raises(ValueError, match=r'layers\.1\.pos_embed \(1, 96, 32\) instead of \(1, 64'):
        load_into(build(), save(state))


# Our names, without being of the same module


def test_dense_twin_starts_a_grained_one(save):
    """And 64 positions of ours may be 4 x 16."""
    image = dict(pretrain_img_size=(32, 128))
    twin, ours = build(granularities=(1,), **image), build(**image)
    report = load_into(ours, save(twin.state_dict()))
    assert report.origin == 'pvt (mmtoken names)' and not report.resized
    assert set(report.newly_initialized) == ROUTERS
    assert all(torch.equal(ours.state_dict()[name], t) for name, t in twin.state_dict().items())


def test_our_classifier_becomes_a_backbone(save):
    classifier = build(cls_token=True, out_type='cls_token', out_indices=(3,))
    ours = build()
    state = {f'backbone.{name}': tensor for name, tensor in classifier.state_dict().items()}
    report = load_into(ours, save(dict(state_dict={**state, 'head.fc.weight': torch.zeros(1)})))
    assert report.newly_initialized == []
    assert 'layers.3.cls_token' in report.dropped and 'norm.weight' in report.dropped
    assert torch.equal(ours.layers[3].pos_embed, classifier.layers[3].pos_embed[:, 1:])


@pytest.mark.parametrize('names', ['official', 'mmdet'])
def test_converted_once_and_again(names, save):
    state = official() if names == 'official' else mmdet_pvt().state_dict()
    converted, _ = convert(state, 'pvt')
    assert detect_source(converted) == 'pvt'
    direct, through = build(), build()
    load_into(direct, save(state))
    load_into(through, save(dict(state_dict=converted)))
    for name, tensor in direct.state_dict().items():
        if '.router.' not in name:
            assert torch.equal(through.state_dict()[name], tensor)


def run_tool(monkeypatch, capsys, *args):
    monkeypatch.setattr(sys, 'argv', ['convert_checkpoint.py', *map(str, args)])
    code = convert_checkpoint.main()
    out, err = capsys.readouterr()
    assert (code, err) == (0, '')
    return out


def test_tool(monkeypatch, capsys, save, tmp_path):
    state = official()
    out = run_tool(monkeypatch, capsys, save(state), tmp_path / 'new.pth', '--source', 'pvt')
    assert 'Read as pvt (official names)' in out and 'head.weight' in out
    ours, direct = build(), build()
    load_into(direct, save(state))
    report = load_into(ours, tmp_path / 'new.pth')
    assert set(report.newly_initialized) == ROUTERS
    assert torch.equal(ours.layers[3].pos_embed, direct.layers[3].pos_embed)


def test_tool_with_a_config(monkeypatch, capsys, save, tmp_path):
    """What is written fits, and its routers are still fresh when it is loaded."""
    backbone = dict(type='mmtoken.DGEPVT', arch=ARCH, pretrain_img_size=96)
    (tmp_path / 'config.py').write_text(f'model = dict(backbone={backbone!r})\n')
    new = tmp_path / 'new.pth'
    out = run_tool(
        monkeypatch, capsys, save(mmdet_pvt().state_dict()), new, '--config', tmp_path / 'config.py'
    )
    for what in ('Read as pvt (mmdet names)', 'split', 'layers.0.pos_embed 16 x 16'):
        assert what in out
    report = load_into(build(pretrain_img_size=96), new)
    assert set(report.newly_initialized) == ROUTERS and not report.resized


# What it is not


@pytest.mark.parametrize('names', ['official', 'mmdet'])
def test_version_2_is_another(names, save):
    if names == 'mmdet':
        state = mmdet_pvt(cls=PyramidVisionTransformerV2, num_layers=(2, 2, 2, 2)).state_dict()
        unknown = r'layers\.0\.1\.0\.attn\.attn\.in_proj_weight|layers\.\* x'
    else:
        state = {name: t for name, t in official().items() if not name.startswith('pos_embed')}
        state['block1.0.mlp.dwconv.dwconv.weight'] = torch.zeros(32, 1, 3, 3)
        unknown = r'layers\.0\.blocks\.0\.mlp\.dwconv|block1\.0\.mlp\.dwconv'
    with pytest.raises(ValueError, match=f'not supported; it has .*({unknown})'):
        convert(state, 'pvt')
    with pytest.raises(ValueError, match=r'does not fit DGEPVT; it was read as pvt .*pos_embed'):
        load_into(build(), save(state))


@pytest.mark.parametrize(
    'name, message',
    [
        ('block2.1.attn.kv.weight', r'lacks: layers\.1\.blocks\.1\.attn\.kv\.weight'),
        ('pos_embed3', r'lacks: layers\.2\.pos_embed'),
        ('patch_embed4.norm.bias', r'lacks: layers\.3\.patch_embed\.norm\.bias'),
    ],
)
def test_only_routers_may_be_missing(name, message, save):
    state = official()
    del state[name]
    with pytest.raises(ValueError, match=rf'it was read as pvt \(official names\).*{message}'):
        load_into(build(), save(state))


def test_head_on_a_detector_needs_its_norm(save):
    ours = build(cls_token=True, out_type='cls_token', out_indices=(3,))
    with pytest.raises(ValueError, match=r'names it lacks: norm\.weight, norm\.bias'):
        load_into(ours, save(official(cls_token=False)))


@pytest.mark.parametrize('target', ['deformable', 'swin'])
def test_families_are_not_confused(target, save):
    if target == 'swin':
        ours = STViTRSwin(dict(embed_dims=16, depths=(1, 1, 6, 1), num_heads=(1, 2, 2, 4)))
    else:
        arch = {name: value for name, value in ARCH.items() if name != 'sr_ratios'}
        ours = DGEDPVT(arch, pretrain_img_size=64, budget=None)
    for state in (official(), mmdet_pvt().state_dict()):
        with pytest.raises(ValueError, match=f'does not fit {type(ours).__name__}.* read as pvt'):
            load_into(ours, save(state))


def test_other_widths_are_listed(save):
    arch = dict(ARCH, embed_dims=(32, 32, 64, 64))
    with pytest.raises(ValueError, match=r'other shapes: .*\(16,\) instead of \(32,\).*\d+ more'):
        load_into(build(arch=arch), save(official()))
