import pickle
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from mmtoken.analysis.cost import macs_by_stage, measure_cost
from mmtoken.analysis.subject import (
    any_subject,
    default_shape,
    load_config,
    make_subject,
    peer_of,
    twin_of,
)

SHAPES = Path(__file__).resolve().parent.parent.parent / 'configs' / 'shapes'
DETECTOR = SHAPES / 'mask-rcnn_stvit-r-swin-nano_fpn_1xb8-7e_shapes.py'
SEGMENTER = SHAPES / 'upernet_stvit-r-swin-nano_1xb16-750i_shapes-128x128.py'
IMAGES = torch.zeros(1, 3, 64, 96)


def test_twin_and_peer_give_maps_of_the_same_shape():
    sparse = make_subject(load_config(SEGMENTER), 'backbone')
    networks = [subject.build() for subject in (sparse, twin_of(sparse), peer_of(sparse))]
    assert [type(n).__module__.split('.')[0] for n in networks] == ['mmtoken', 'mmtoken', 'mmdet']
    assert not any(network.training for network in networks)
    shapes = [[map_.shape for map_ in network(IMAGES)] for network in networks]
    assert shapes[0] == shapes[1] == shapes[2] and len(shapes[0]) == 4


@pytest.mark.parametrize('path', [DETECTOR, SEGMENTER])
def test_models_run_up_to_their_raw_outputs(path):
    sparse = make_subject(load_config(path), 'model')
    for subject in (sparse, twin_of(sparse), peer_of(sparse)):
        network = subject.build()
        stages = macs_by_stage(network, IMAGES, root=network.model)
        assert list(stages)[0] == 'backbone' and list(stages)[-1] in ('roi_head', 'decode_head')


def test_of_other_configs_any_backbone_will_do():
    cfg = Config(dict(model=dict(backbone=dict(type='ResNet', depth=18)), default_scope='mmdet'))
    subject = any_subject(cfg, 'backbone', 'resnet')
    assert subject.mixed and type(subject.build()).__name__ == 'ResNet'
    with pytest.raises(ValueError, match="yolo: its model has no `backbone`, only \\['type'\\]"):
        any_subject(Config(dict(model=dict(type='YOLO'))), 'backbone', 'yolo')


@pytest.mark.parametrize(
    'text, message',
    [
        ("default_scope = 'mmpose'", "'mmpose'; it must be one of mmdet"),
        ("default_scope = 'mmseg'", 'needs a `model`'),
    ],
)
def test_configs_of_other_kinds(text, message, tmp_path):
    (tmp_path / 'config.py').write_text(text)
    with pytest.raises(ValueError, match=message):
        load_config(tmp_path / 'config.py')


def test_tokens_for_a_neck_become_maps_where_there_is_no_neck():
    backbone = dict(type='mmtoken.STViTRSwin', out_type='tokens')
    cfg = Config(dict(model=dict(backbone=backbone, neck={}), default_scope='mmdet'))
    assert make_subject(cfg, 'backbone').cfg['backbone']['out_type'] == 'map'
    assert make_subject(cfg, 'model').cfg['backbone']['out_type'] == 'tokens'


def test_model_with_a_neck_of_ours_alone():
    neck = dict(
        type='mmtoken.GrainUnpoolNeck', in_channels=[64, 128, 256, 512], num_heads=4, depth=1,
        sr_ratios=4,
    )  # fmt: skip
    model = dict(
        type='EncoderDecoder',
        backbone=dict(type='ResNet', depth=18),
        neck=neck,
        decode_head=dict(
            type='FCNHead', in_channels=512, channels=8, num_classes=2, num_convs=1, in_index=3,
            norm_cfg=dict(type='BN'),
        ),
    )  # fmt: skip
    cfg = Config(dict(model=model, default_scope='mmseg'))
    sparse = make_subject(cfg, 'model', dict(query_ratio=0.5))
    assert sparse.name == 'GrainUnpoolNeck' and peer_of(sparse) is None
    dense = twin_of(sparse)
    assert dense.routing == {} and dense.cfg['neck']['granularities'] == (1,)
    cost, twin_cost = (
        measure_cost(subject.build(), IMAGES, inside=subject.overriding)
        for subject in (sparse, dense)
    )
    assert cost.macs < twin_cost.macs and twin_cost.query_ratio is None
    assert cost.query_ratio == pytest.approx(0.5, abs=0.05)
    with pytest.raises(ValueError, match='no backbone of mmtoken'):
        make_subject(cfg, 'backbone')


PURE = """
from mmseg.models import EncoderDecoder, FCNHead
from mmtoken.backbones import STViTRSwin

default_scope = None
backbone = dict(
    type=STViTRSwin, in_channels={channels},
    arch=dict(embed_dims=16, depths=(1, 1, 6, 1), num_heads=(1, 2, 2, 4)),
)
head = dict(
    type=FCNHead, in_channels=128, channels=8, num_classes=2, num_convs=1, in_index=3,
)
model = dict(type=EncoderDecoder, backbone=backbone, decode_head=head)
"""


@pytest.mark.parametrize('part', ['backbone', 'model'])
@pytest.mark.parametrize('channels', [1, 4, 6])
def test_pure_python_config_with_other_channels(channels, part, tmp_path):
    path = tmp_path / 'config.py'
    path.write_text(PURE.format(channels=channels))
    cfg = load_config(path)
    assert cfg.default_scope == 'mmseg'
    sparse = make_subject(cfg, part)
    assert sparse.name == 'STViTRSwin' and sparse.in_channels == channels
    for subject in (sparse, twin_of(sparse), peer_of(sparse), pickle.loads(pickle.dumps(sparse))):
        assert subject.in_channels == channels
        subject.build()(torch.zeros(1, channels, 64, 64))
    # As MMEngine writes it into a work dir
    cfg.dump(tmp_path / 'dump.py')
    assert make_subject(load_config(tmp_path / 'dump.py'), part).name == 'STViTRSwin'


def test_what_cannot_be_built_is_said():
    backbone = dict(type='mmtoken.STViTRSwin', arch='huge')
    cfg = Config(dict(model=dict(backbone=backbone), default_scope='mmdet'))
    with pytest.raises(ValueError, match="mmtoken.STViTRSwin cannot be built: .*'huge'"):
        make_subject(cfg, 'backbone').build()


def pipeline(*transforms):
    return dict(test_dataloader=dict(dataset=dict(dataset=dict(pipeline=list(transforms)))))


@pytest.mark.parametrize(
    'settings, shape',
    [
        (dict(default_scope='mmdet'), (800, 1280)),
        (dict(default_scope='mmseg'), (512, 512)),
        (dict(default_scope='mmpretrain'), (224, 224)),
        (pipeline(dict(type='Resize', scale=(1333, 800), keep_ratio=True)), (800, 1280)),
        (pipeline(dict(type='Resize', scale=(220, 160), keep_ratio=True)), (160, 224)),
        (pipeline(dict(type='Resize', scale=(640, 480))), (480, 640)),
        (
            pipeline(dict(type='ResizeEdge', scale=256), dict(type='CenterCrop', crop_size=192)),
            (192, 192),
        ),
        (dict(model=dict(data_preprocessor=dict(size=(96, 128)))), (96, 128)),
    ],
)
def test_default_shape(settings, shape):
    assert default_shape(Config(dict(dict(default_scope='mmdet', model={}), **settings))) == shape
