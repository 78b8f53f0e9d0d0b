"""Stock models of the libraries become sparse ones, and their dense twins compute the same."""

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, MODELS, init_default_scope

import mmtoken
from mmtoken.analysis.configs import load_config
from mmtoken.conversion import METHODS, sparsify
from mmtoken.conversion.methods import sparse_backbone
from mmtoken.conversion.plain import describe
from mmtoken.conversion.sparsify import FOREIGN_TWIN, initial_weights

TRAINING = """
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=12)
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=0.01))
param_scheduler = [dict(type='MultiStepLR', milestones=[8])]
custom_hooks = [dict(type='EMAHook')]
default_hooks = dict(timer=dict(type='IterTimerHook'))
"""
SWIN = """
default_scope = 'mmdet'
model = dict(
    type='RetinaNet',
    backbone=dict(
        type='SwinTransformer', embed_dims=16, depths=[1, 1, 6, 1], num_heads=[1, 2, 2, 2],
        out_indices=(1, 2, 3), drop_path_rate=0.1, frozen_stages=1,
    ),
    neck=dict(type='FPN', in_channels=[32, 64, 128], out_channels=16, num_outs=5),
    bbox_head=dict(
        type='RetinaHead', num_classes=3, in_channels=16, feat_channels=16, stacked_convs=1,
        anchor_generator=dict(
            type='AnchorGenerator', octave_base_scale=4, scales_per_octave=1, ratios=[1.0],
            strides=[8, 16, 32, 64, 128],
        ),
    ),
    test_cfg=dict(nms_pre=10, score_thr=0.1, nms=dict(type='nms', iou_threshold=0.5)),
)
"""
PVT = """
default_scope = 'mmdet'
model = dict(
    type='RetinaNet',
    backbone=dict(
        type='PyramidVisionTransformer', num_layers=[1, 1, 1, 1], embed_dims=8,
        num_heads=[1, 2, 2, 4], mlp_ratios=[2, 2, 2, 2], drop_path_rate=0.2,
    ),
    neck=dict(type='FPN', in_channels=[8, 16, 16, 32], out_channels=16, num_outs=5),
    bbox_head=dict(
        type='RetinaHead', num_classes=3, in_channels=16, feat_channels=16, stacked_convs=1,
        anchor_generator=dict(
            type='AnchorGenerator', octave_base_scale=4, scales_per_octave=1, ratios=[1.0],
            strides=[4, 8, 16, 32, 64],
        ),
    ),
    test_cfg=dict(nms_pre=10, score_thr=0.1, nms=dict(type='nms', iou_threshold=0.5)),
)
"""
VIT = """
default_scope = 'mmseg'
model = dict(
    type='EncoderDecoder',
    pretrained=None,
    backbone=dict(
        type='VisionTransformer', img_size=(64, 64), patch_size=16, embed_dims=32, num_layers=6,
        num_heads=2, mlp_ratio=2, out_indices=(3, 5), qkv_bias=True, drop_path_rate=0.1,
        norm_cfg=dict(type='LN', eps=1e-6),
    ),
    decode_head=dict(
        type='FCNHead', in_channels=32, in_index=1, channels=16, num_convs=1, num_classes=3,
        norm_cfg=dict(type='BN'),
    ),
    test_cfg=dict(mode='whole'),
)
"""
CLASSIFIER = """
default_scope = 'mmpretrain'
model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='VisionTransformer', img_size=64, patch_size=16, out_type='cls_token',
        arch=dict(embed_dims=32, num_layers=6, num_heads=2, feedforward_channels=64),
    ),
    head=dict(type='LinearClsHead', num_classes=3, in_channels=32),
)
"""
STOCK = dict(swin=SWIN, pvt=PVT, vit=VIT, classifier=CLASSIFIER)
CASES = [
    ('swin', 'stvit-r'), ('pvt', 'dge'),
    *(('vit', method) for method in ('stvit', 'dge', 'msvit', 'merge')),
    *(('classifier', method) for method in ('stvit', 'dge', 'msvit', 'merge')),
]  # fmt: skip


def write_stock(folder, name):
    """A config, and a checkpoint with weights that differ from the initial ones."""
    config = folder / f'{name}.py'
    config.write_text(STOCK[name] + TRAINING)
    model = build(load_config(config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    torch.save(dict(state_dict=model.state_dict()), folder / f'{name}.pth')
    return str(config), str(folder / f'{name}.pth')


def build(cfg):
    init_default_scope(cfg.default_scope)
    torch.manual_seed(0)
    return MODELS.build(cfg.model).eval()


def load(cfg, checkpoint):
    model = build(cfg)
    left = model.load_state_dict(torch.load(checkpoint, weights_only=True)['state_dict'], False)
    return model, left


@pytest.mark.parametrize('name, method', CASES)
def test_the_twin_of_the_result_is_the_stock_model(name, method, tmp_path):
    config, checkpoint = write_stock(tmp_path, name)
    result = sparsify(config, method, tmp_path / 'sparse', checkpoint)
    cfg = load_config(result.config)
    assert cfg.load_from == str(result.checkpoint)
    stock, _ = load(load_config(config), checkpoint)
    # Those of Swin and STViT have weights that the sparse network lacks.
    twin, left = load(
        mmtoken.dense_twin(cfg), checkpoint if method in FOREIGN_TWIN else result.checkpoint
    )
    assert not left.missing_keys
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        pairs = zip(twin.extract_feat(images), stock.extract_feat(images), strict=True)
    for got, wanted in pairs:  # some norms of PVT have another epsilon
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3 if name == 'pvt' else 1e-4)

    sparse, left = load(cfg, result.checkpoint)
    assert set(left.missing_keys) == {f'backbone.{n}' for n in result.report.newly_initialized}
    sparse.train()
    with mmtoken.token_losses():
        maps = sparse.extract_feat(images)
    sum(m.square().mean() for m in maps).backward()


def test_other_settings_stay(tmp_path):
    config, checkpoint = write_stock(tmp_path, 'pvt')
    sparse = load_config(sparsify(config, 'dge', tmp_path, checkpoint).config)
    stock = load_config(config)
    assert sparse.custom_hooks == stock.custom_hooks  # hooks of the base are not lost
    assert sparse.default_hooks == dict(
        stock.default_hooks, token_losses=dict(type='mmtoken.TokenLossHook')
    )
    assert sparse.model.backbone.drop_path_rate == 0.2
    for key in ('neck', 'bbox_head', 'test_cfg'):
        assert sparse.model[key] == stock.model[key]
    assert sparse.param_scheduler == stock.param_scheduler


@pytest.mark.parametrize('name, method', [('swin', 'stvit-r'), ('pvt', 'dge')])
def test_a_short_schedule_with_a_teacher(name, method, tmp_path):
    config, checkpoint = write_stock(tmp_path, name)
    cfg = load_config(sparsify(config, method, tmp_path, checkpoint, finetune=2).config)
    assert cfg.train_cfg.max_epochs == 2 and cfg.optim_wrapper.optimizer.lr == pytest.approx(0.001)
    hook = HOOKS.build(cfg.default_hooks.token_losses)
    assert isinstance(hook, Hook) and hook.checkpoint == (checkpoint if name == 'swin' else None)


def test_a_base_of_a_library(tmp_path):
    """Its pretrained weights go to the sparse backbone, which converts them when it loads them."""
    base = 'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py'
    result = sparsify(base, 'stvit-r', tmp_path)
    cfg = load_config(result.config)
    assert cfg.model.backbone.init_cfg.checkpoint.endswith('swin_tiny_patch4_window7_224.pth')
    assert cfg.model.backbone.arch == 'tiny' and result.checkpoint is None
    assert 'token_losses' not in cfg.default_hooks  # nothing is chosen, so nothing has a loss
    assert cfg.model.roi_head.bbox_head.num_classes == 80


@pytest.mark.parametrize(
    'base, method, file',
    [
        ('mmdet::pvt/retinanet_pvt-s_fpn_1x_coco.py', 'dge', 'pvt_small.pth'),  # no type
        (
            'mmseg::vit/vit_vit-b16_mln_upernet_8xb2-80k_ade20k-512x512.py',  # pretrained=...
            'msvit',
            'vit_base_patch16_224.pth',
        ),
        (
            'mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py',
            'stvit-r',
            'swin_tiny_patch4_window7_224_20220317-1cdeb081.pth',
        ),
    ],
)
def test_weights_that_training_starts_from_stay(base, method, file, tmp_path):
    cfg = load_config(sparsify(base, method, tmp_path).config)
    assert cfg.model.get('pretrained') is None
    assert cfg.model.backbone.init_cfg.type == 'Pretrained'
    assert cfg.model.backbone.init_cfg.checkpoint.endswith(file)
    MODELS.build(cfg.model.backbone)


@pytest.mark.parametrize(
    'changes, expected',
    [
        (
            dict(init_cfg=[dict(type='Normal', layer='Linear')]),
            [dict(type='Normal', layer='Linear')],
        ),
        (dict(pretrained='vit.pth'), dict(type='Pretrained', checkpoint='vit.pth')),
        ({}, None),
    ],
)
def test_initial_weights(changes, expected, tmp_path):
    cfg = load_config(write_stock(tmp_path, 'vit')[0])
    cfg.model.backbone.update(changes)
    assert initial_weights(cfg) == expected


def test_nothing_is_overwritten_or_left_behind(tmp_path):
    config, checkpoint = write_stock(tmp_path, 'vit')
    result = sparsify(config, 'merge', tmp_path / 'out', checkpoint)
    before = result.config.read_text()
    with pytest.raises(FileExistsError, match='vit_merge.py exists'):
        sparsify(config, 'merge', tmp_path / 'out', checkpoint)
    assert result.config.read_text() == before
    _, other = write_stock(tmp_path, 'swin')
    with pytest.raises(ValueError, match='swin.pth'):
        sparsify(config, 'msvit', tmp_path / 'out', other)
    assert len(list((tmp_path / 'out').iterdir())) == 2


@pytest.mark.parametrize(
    'method, changes, message',
    [
        ('msvit', dict(type='ResNet', depth=50), 'no method fits .*ResNet; known are mmdet.Swin'),
        ('dge', {}, 'dge does not fit mmdet.SwinTransformer; stvit-r would'),
        ('tome', {}, "no method 'tome'; there are stvit-r, stvit, dge, msvit, merge"),
        ('stvit-r', dict(use_abs_pos_embed=True), 'use_abs_pos_embed=True .* no counterpart'),
        ('stvit-r', dict(norm_cfg=dict(type='BN')), "only type='LN' has"),
    ],
)
def test_what_has_no_counterpart_is_refused(method, changes, message, tmp_path):
    config, _ = write_stock(tmp_path, 'swin')
    cfg = Config.fromfile(config)
    cfg.model.backbone = changes if 'type' in changes else dict(cfg.model.backbone, **changes)
    cfg.dump(tmp_path / 'changed.py')
    with pytest.raises(ValueError, match=message):
        sparsify(str(tmp_path / 'changed.py'), method, tmp_path)


def test_sparse_networks_are_refused():
    with pytest.raises(ValueError, match='computes on fewer tokens already'):
        describe(dict(type='mmtoken.MSViT'), 'mmseg')


def test_every_method_is_tested():
    assert {method for _, method in CASES} == set(METHODS)


def test_later_trunks():
    base = describe(dict(type='mmtoken.MSViT', arch='dinov3-small', gate=None), 'mmseg')
    for method in ('msvit', 'dge', 'merge', 'stvit'):
        sparse, _ = sparse_backbone(base, method)
        assert sparse['arch'] == 'dinov3-small' and sparse.get('cls_token', True)
    arch = dict(embed_dims=32, num_layers=2, num_heads=2, feedforward_channels=64)
    own = dict(arch, mlp='swiglu', norm_eps=1e-6)
    sparse, _ = sparse_backbone(
        describe(dict(type='mmtoken.MSViT', arch=own, gate=None), 'mmseg'), 'dge'
    )
    assert sparse['arch'] == dict(arch, mlp='swiglu')
