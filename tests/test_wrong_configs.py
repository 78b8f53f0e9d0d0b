"""What is wrong in a config is said in one line: what was given, and what is allowed.

Names and indices that no backbone has are in ``test_backbones/test_contract.py``, arguments of
other libraries in ``test_arguments.py``.
"""

import re

import pytest
import torch
from families import FAMILIES, PVT, SMALL_VIT, SWIN
from mmengine.config import Config
from mmengine.registry import HOOKS, MODELS
from mmengine.runner import Runner

import mmtoken

VITS = [name for name in FAMILIES if name in ('STViTDeiT', 'DGEDeiT', 'MSViT', 'MergeViT')]
WHOLE = 'must be a whole number of 1 or more, got'


def in_all(*cases, names=tuple(FAMILIES)):
    """The same cases of several backbones."""
    return [(name, *case) for name in names for case in cases]


def in_arch(name, **values):
    return dict(arch=dict(FAMILIES[name].small['arch'], **values))


# Backbone, wrong arguments, and the message
BACKBONES = [
    *in_all(
        (dict(out_indeces=(0,)), 'takes no out_indeces: it takes arch, '),
        (dict(out_indices='0'), "out_indices must be rising indices from 0 to .*, got .*'0'"),
        (dict(out_indices=(0.5,)), r'out_indices must be rising indices from 0 to .*, got \(0.5,'),
        (dict(frozen_stages='all'), "frozen_stages must be from -1 to .*, got 'all'"),
        (dict(in_channels=0), 'in_channels must be channels, of 1 or more, got 0'),
        (dict(drop_path_rate=1.5), 'drop_path_rate must be a number from 0 to below 1, got 1.5'),
        (dict(drop_path_rate='x'), "drop_path_rate must be a number from 0 to below 1, got 'x'"),
    ),
    *in_all(
        (dict(img_size=0), r'img_size must be a side of 1 or more pixels, or \(H, W\), got 0'),
        (dict(img_size=(32, 32, 32)), r'img_size must be .*, or \(H, W\), got \(32, 32, 32\)'),
        names=[name for name, f in FAMILIES.items() if f.size and f.size[0] == 'img_size'],
    ),
    *(
        (name, in_arch(name, **values), message)
        for name in (*VITS, 'SWATDeiT')
        for values, message in (
            (dict(num_layers=0), r"arch\['num_layers'\] .* of 1 or more, such as 12, got 0"),
            (dict(num_layers='6'), r"arch\['num_layers'\] .* of 1 or more, such as 12, got '6'"),
            (dict(embed_dims=32.0), r"arch\['embed_dims'\] .*, such as 192, got 32.0"),
            (dict(feedforward_channels=-1), r"arch\['feedforward_channels'\] .*, got -1"),
            (dict(num_heads=3), 'embed_dims=32 is no multiple of num_heads=3'),
        )
    ),
    *(
        (name, dict(arch=dict(SMALL_VIT, **values)), message)
        for name in VITS
        for values, message in (
            (dict(mlp='relu'), r"arch\['mlp'\] must be one of \('gelu', .*, got 'relu'"),
            (dict(rotary='rope'), r"arch\['rotary'\] must be one of \(None, .*, got 'rope'"),
        )
    ),
    *in_all(
        (dict(patch_size=0), f'patch_size {WHOLE} 0'),
        (dict(num_registers=-1), 'num_registers must be a whole number of 0 or more, got -1'),
        names=['STViTDeiT', 'DGEDeiT', 'MergeViT'],
    ),
    *(
        (name, in_arch(name, depths=depths), r"arch\['depths'\] must be whole numbers of 1 or more")
        for name in ('STViTRSwin', 'SWATSwin', 'DGEPVT', 'DGEDPVT')
        for depths in (2, (2, 0), (1, 1.5))
    ),
    *in_all(
        (dict(window_size=0), f'window_size {WHOLE} 0'),
        (dict(window_size=3.5), f'window_size {WHOLE} 3.5'),
        (dict(mlp_ratio=-1), 'mlp_ratio must be a number above 0, got -1'),
        names=['STViTRSwin', 'SWATSwin'],
    ),
    *in_all(
        (dict(region_size=0), f'region_size {WHOLE} 0'),
        (dict(region_size=6), 'granularities must rise from 1 and divide region_size=6'),
        (dict(budget=0.5), 'budget must be a dict or None, got 0.5'),
        (dict(budget=dict(target=0.5)), r"budget must be a dict such as .*, got \{'target': 0.5\}"),
        (
            dict(budget=dict(type='mmtoken.BudgetLoss', target=1.5)),
            'target must be above 0 and at most 1, got 1.5',
        ),
        (
            dict(budget=dict(type='mmtoken.BudgetLoss', ratio=0.5)),
            'BudgetLoss takes no ratio: it takes target, loss_weight',
        ),
        (dict(router=True), 'router must be a dict or None, got True'),
        (dict(router=dict(ratio=0.5)), r"router takes \('label_loss', .*, got \['ratio'\]"),
        (
            dict(router=dict(query_ratio='half')),
            "query_ratio must be above 0 and at most 1, got 'half'",
        ),
        (dict(router=dict(label_loss=True)), r'label_loss must be a dict such as .*, got True'),
        names=['DGEPVT', 'DGEDPVT', 'DGEDeiT'],
    ),
    ('DGEPVT', dict(pretrain_img_size=0), 'pretrain_img_size must be a side of 1 or more'),
    ('DGEPVT', dict(arch=dict(PVT, sr_ratios=(8, 4, 2, 0))), r"arch\['sr_ratios'\] .*2, 0\)"),
    ('DGEDPVT', dict(num_points=0), f'num_points {WHOLE} 0'),
    ('STViTRSwin', dict(arch=dict(SWIN, depths=(2, 1, 5, 1))), 'a multiple of 6.* got depths='),
    ('STViTRSwin', dict(key_sizes='14'), "key_sizes are three sides .*, got .'1', '4'."),
    ('STViTDeiT', dict(semantic_size=1.5), 'semantic_size .* of 1 or more, or None, got 1.5'),
    ('STViTDeiT', dict(pooling='avg'), r"pooling must be one of \('attention', .*, got 'avg'"),
    ('MSViT', dict(fine_size=0), f'fine_size {WHOLE} 0'),
    ('MSViT', dict(coarse_size=24), 'coarse_size must be a multiple of fine_size=16.* got 24'),
    ('MSViT', dict(gate=True), 'gate must be a dict or None, got True'),
    ('MSViT', dict(gate=dict(ratio=0.5)), r"gate takes \('input', .*, got \['ratio'\]"),
    ('MSViT', dict(gate=dict(fine_ratio='x')), r"gate\['fine_ratio'\] .* from 0 to 1, got 'x'"),
    ('MSViT', dict(gate=dict(hidden_channels=0)), 'hidden_channels must be 1 or more, got 0'),
    ('MSViT', dict(gate=dict(loss=0.5)), r"gate\['loss'\] must be a dict such as .*, got 0.5"),
    ('MSViT', dict(window_size=3, cls_token=False), r'a multiple of .* = 2, got 3'),
    ('MergeViT', dict(merge_blocks='all'), r"merge_blocks must be from -3 to 2, got \('a', "),
    ('MergeViT', dict(merge_blocks=None), r'merge_blocks must be from -3 to 2, got \(None,'),
    ('MergeViT', dict(least_tokens='half'), "least_tokens must be from 0 to 1, got 'half'"),
    ('PSViT', dict(arch=dict(stages=[32])), r'stage 0 must be \(embed_dims, .*, got \(32,\)'),
    ('PSViT', dict(arch=dict(stages=[(32, 0, (1,))])), 'num_heads must be 1 or more, stage 0 has'),
    ('PSViT', dict(mlp_ratio=0), 'mlp_ratio must be a number above 0, got 0'),
    ('SWATDeiT', dict(plane_size=3), r'embed_dims must be a multiple of plane_size\*\*2 = 9'),
]  # fmt: skip
# Other parts of a model, and hooks
PARTS = [
    (MODELS, dict(type='BudgetLoss', target='half'), "above 0 and at most 1, got 'half'"),
    (MODELS, dict(type='BudgetLoss', loss_weight='1'), "loss_weight must be 0 or more, got '1'"),
    (MODELS, dict(type='BatchShapingLoss', grid=3), 'grid must be two numbers .*, got 3'),
    (MODELS, dict(type='CoarseRatioLoss', ratio=0.5), 'takes no ratio: it takes target_coarse'),
    (MODELS, dict(type='LabelPurityLoss', min_purity='x'), "above 0 and below 1, got 'x'"),
    (MODELS, dict(type='SimpleFeaturePyramid', in_channels=0), 'channels, of 1 or more, got 0'),
    (MODELS, dict(type='SimpleFeaturePyramid', in_chanels=8), 'no in_chanels: it takes in_ch'),
    (MODELS, dict(type='MixedScaleNeck', in_channels='8'), "channels, of 1 or more, got '8'"),
    (MODELS, dict(type='GrainUnpoolNeck', in_channels=32, num_heads=2, budget=0.5), 'got 0.5'),
    (HOOKS, dict(type='TokenLossHook', weight=1), 'takes no weight: it takes no arguments'),
    (HOOKS, dict(type='TokenMapHook', images=4), 'takes no images: it takes num_images, '),
    (HOOKS, dict(type='RandomStateHook', seed=0), 'takes no seed: it takes no arguments'),
    (HOOKS, dict(type='TwinDistillHook', weight=1), 'takes no weight: it takes checkpoint, ema'),
    (HOOKS, dict(type='TwinDistillHook', ema=2), 'ema must be above 0 and below 1, got 2'),
]


def check(error, message):
    assert type(error) in (ValueError, TypeError)
    assert re.search(message, str(error)), str(error)
    assert len(str(error).splitlines()) == 1


@pytest.mark.parametrize('name, args, message', BACKBONES)
def test_backbones(name, args, message):
    with pytest.raises(Exception) as caught:
        MODELS.build(dict(type=f'mmtoken.{name}', **{**FAMILIES[name].small, **args}))
    check(caught.value, message)


@pytest.mark.parametrize('registry, cfg, message', PARTS)
def test_other_parts(registry, cfg, message):
    with pytest.raises(Exception) as caught:
        registry.build(dict(cfg, type=f'mmtoken.{cfg["type"]}'))
    check(caught.value, message)


@pytest.mark.parametrize('tokens', [0, 1.5, 'half'])
def test_budgets(tokens):
    model = MODELS.build(dict(type='mmtoken.MSViT', **FAMILIES['MSViT'].small))
    with pytest.raises(ValueError, match=f'tokens must be from 0.25 to 1 .*, got {tokens!r}'):
        mmtoken.set_budget(model, tokens=tokens)


NECKS = [
    ('SimpleFeaturePyramid', 'SWATDeiT', {}),
    ('GrainUnpoolNeck', 'SWATDeiT', dict(num_heads=2)),
    ('MixedScaleNeck', 'MSViT', {}),
    ('SemanticRecoveryNeck', 'STViTDeiT', dict(num_heads=2)),
]


@pytest.mark.parametrize('name, backbone, args', NECKS)
def test_necks_for_other_channels(name, backbone, args):
    kwargs = FAMILIES[backbone].small
    if backbone != 'SWATDeiT':
        kwargs = dict(kwargs, out_type='tokens')
    outputs = MODELS.build(dict(type=f'mmtoken.{backbone}', **kwargs)).eval()(
        torch.zeros(1, 3, 64, 64)
    )
    neck = MODELS.build(dict(type=f'mmtoken.{name}', in_channels=16, **args))
    with pytest.raises(ValueError, match=f'{name} was built for in_channels=16, got 32 channels'):
        neck(outputs)


def test_a_type_without_the_prefix(tmp_path):
    """MMEngine names the type, and how to import what is missing."""
    for kind in ('MSViT', 'mmtoken.MSVit'):
        cfg = Config(dict(model=dict(type=kind), work_dir=str(tmp_path)))
        with pytest.raises(KeyError, match=f'{kind} is not in the .*model registry.*import'):
            Runner.from_cfg(cfg)
