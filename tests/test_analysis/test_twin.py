import copy

import pytest
from mmengine.config import Config, ConfigDict

import mmtoken
from mmtoken.analysis.twin import find_backbone, known_parts
from mmtoken.backbones import STViTRSwin
from mmtoken.engine import TokenLossHook
from mmtoken.registry import MODELS

BACKBONE = dict(type='mmtoken.STViTRSwin', arch='tiny', semantic_size=3)
TWIN = dict(BACKBONE, semantic_size=None)


@pytest.fixture
def restoring_neck(monkeypatch):
    class MapNeck:
        def __init__(self, in_channels):
            pass

    class RestoringNeck:
        twin_type = 'mmtoken.MapNeck'

    monkeypatch.setitem(MODELS.module_dict, 'MapNeck', MapNeck)
    monkeypatch.setitem(MODELS.module_dict, 'RestoringNeck', RestoringNeck)
    return dict(type='mmtoken.RestoringNeck', in_channels=96, num_heads=3)


class Derived(STViTRSwin):
    pass


@pytest.mark.parametrize(
    'kind',
    ['mmtoken.STViTRSwin', 'STViTRSwin', STViTRSwin, 'mmtoken.backbones.STViTRSwin', Derived],
)
def test_backbone(kind):
    cfg = dict(BACKBONE, type=kind)
    before = copy.deepcopy(cfg)
    twin = mmtoken.dense_twin(cfg)
    assert twin == dict(cfg, semantic_size=None) and cfg == before
    assert mmtoken.dense_twin(twin) == twin


def test_every_backbone_of_ours_has_a_twin():
    backbones = known_parts()
    assert {'mmtoken.STViTRSwin', 'mmtoken.DGEPVT'} <= set(backbones)
    for name in backbones:
        MODELS.build(mmtoken.dense_twin(dict(type=name)))


def test_model_with_a_neck_that_restores(restoring_neck):
    model = dict(type='mmdet.RetinaNet', backbone=dict(BACKBONE, out_type='tokens'))
    for neck in (restoring_neck, [restoring_neck, dict(type='mmdet.FPN')]):
        twin = mmtoken.dense_twin(dict(model, neck=neck))
        assert twin['backbone'] == dict(TWIN, out_type='map')
        first = twin['neck'][0] if isinstance(neck, list) else twin['neck']
        assert first == dict(type='mmtoken.MapNeck', in_channels=96)
    assert twin['neck'][1] == dict(type='mmdet.FPN')
    assert restoring_neck['num_heads'] == 3


def test_mixed_scales_with_a_neck_that_restores(restoring_neck):
    backbone = dict(type='mmtoken.MSViT', arch='tiny', out_type='tokens', gate=dict(num_layers=2))
    twin = mmtoken.dense_twin(dict(backbone=backbone, neck=restoring_neck))
    assert twin['backbone'] == dict(backbone, gate=None, out_type='map')
    assert twin['neck'] == dict(type='mmtoken.MapNeck', in_channels=96)


def test_pyramid_of_planes_becomes_an_ordinary_one():
    neck = dict(type='mmtoken.SimpleFeaturePyramid', in_channels=192, plane_size=8)
    model = dict(backbone=dict(type='mmtoken.SWATDeiT', arch='tiny'), neck=neck)
    twin = mmtoken.dense_twin(model)
    assert twin['backbone'] == dict(model['backbone'], structured=False)
    assert twin['neck'] == dict(neck, plane_size=None)


NECK = dict(type='mmtoken.GrainUnpoolNeck', in_channels=[64, 128], num_heads=[1, 2])
NECK_TWIN = dict(NECK, granularities=(1,), budget=None)


def test_model_with_a_neck_of_ours_alone():
    model = dict(type='mmdet.RetinaNet', backbone=dict(type='mmdet.ResNet', depth=18))
    for neck, twin in (
        (NECK, NECK_TWIN),
        ([NECK, dict(type='mmdet.FPN')], [NECK_TWIN, dict(type='mmdet.FPN')]),
    ):
        assert mmtoken.dense_twin(dict(model, neck=neck)) == dict(model, neck=twin)
        with pytest.raises(ValueError, match="no backbone of mmtoken, only 'mmdet.ResNet'"):
            find_backbone(dict(model, neck=neck))
    assert mmtoken.dense_twin(NECK) == NECK_TWIN
    assert 'budget' not in NECK


def test_neck_beside_a_backbone_of_ours():
    model = dict(type='mmdet.RetinaNet', backbone=dict(type='mmtoken.DGEPVT'), neck=NECK)
    twin = mmtoken.dense_twin(model)
    assert twin['backbone'] == dict(type='mmtoken.DGEPVT', granularities=(1,), budget=None)
    assert twin['neck'] == NECK_TWIN


def test_nested_models():
    model = dict(
        type='mmdet.SoftTeacher',
        detector=dict(type='mmdet.RetinaNet', backbone=BACKBONE),
        teachers=[dict(backbone=dict(type='mmdet.ResNet')), dict(backbone=BACKBONE)],
    )
    twin = mmtoken.dense_twin(ConfigDict(model))
    assert twin.detector.backbone == TWIN
    assert twin.teachers[0].backbone == dict(type='mmdet.ResNet')
    assert twin.teachers[1].backbone == TWIN


def test_config_loses_the_token_hooks():
    hooks = [dict(type='mmtoken.TokenLossHook'), dict(type='EMAHook'), dict(type=TokenLossHook)]
    cfg = Config(
        dict(
            model=dict(backbone=BACKBONE),
            custom_hooks=hooks,
            default_hooks=dict(
                token_losses=hooks[0],
                token_maps=dict(type='mmtoken.TokenMapHook'),
                timer=dict(type='IterTimerHook'),
                logger=None,
            ),
            default_scope='mmdet',
        )
    )
    twin = mmtoken.dense_twin(cfg)
    assert isinstance(twin, Config) and twin.model.backbone == TWIN
    assert twin.custom_hooks == [dict(type='EMAHook')]
    assert twin.default_hooks == dict(timer=dict(type='IterTimerHook'), logger=None)
    assert cfg.model.backbone == BACKBONE and len(cfg.custom_hooks) == 3
    assert mmtoken.dense_twin(twin).to_dict() == twin.to_dict()


@pytest.mark.parametrize(
    'cfg, given',
    [
        (dict(type='mmdet.ResNet'), "'mmdet.ResNet'"),
        (dict(backbone=dict(type='SwinTransformer')), "'SwinTransformer'"),
        (dict(type='mmtoken.Swin'), "'mmtoken.Swin'"),
        (Config(dict(model=dict(type='YOLO'))), "'YOLO'"),
    ],
)
def test_not_ours(cfg, given):
    with pytest.raises(ValueError, match=f'only {given}; known are .*mmtoken.STViTRSwin'):
        mmtoken.dense_twin(cfg)


def test_no_config_at_all():
    with pytest.raises(TypeError, match='got str'):
        mmtoken.dense_twin('STViTRSwin')
    with pytest.raises(ValueError, match="no model; its keys are \\['optim'\\]"):
        mmtoken.dense_twin(Config(dict(optim=1)))
