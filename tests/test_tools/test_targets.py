import pickle
from pathlib import Path

import pytest
import torch
from benchmarking.targets import (
    build_other_target,
    build_target,
    dense_target,
    library_target,
)
from mmengine.config import Config

from mmtoken.analysis.configs import load_config

SHAPES = Path(__file__).resolve().parent.parent.parent / 'configs' / 'shapes'
DETECTOR = SHAPES / 'mask-rcnn_stvit-r-swin-nano_fpn_1xb8-7e_shapes.py'
SEGMENTER = SHAPES / 'upernet_stvit-r-swin-nano_1xb16-750i_shapes-128x128.py'
IMAGES = torch.zeros(1, 3, 64, 96)


def test_twin_and_baseline_give_maps_of_the_same_shape():
    sparse = build_target(load_config(SEGMENTER), 'backbone')
    networks = [target.build() for target in (sparse, dense_target(sparse), library_target(sparse))]
    assert [type(n).__module__.split('.')[0] for n in networks] == ['mmtoken', 'mmtoken', 'mmdet']
    assert not any(network.training for network in networks)
    shapes = [[map_.shape for map_ in network(IMAGES)] for network in networks]
    assert shapes[0] == shapes[1] == shapes[2] and len(shapes[0]) == 4


@pytest.mark.parametrize('path', [DETECTOR, SEGMENTER])
def test_models_run_up_to_their_raw_outputs(path):
    sparse = build_target(load_config(path), 'model')
    for target in (sparse, dense_target(sparse), library_target(sparse)):
        stages = target.measure_cost(target.build(), IMAGES).stages
        assert list(stages)[0] == 'backbone' and list(stages)[-1] in ('roi_head', 'decode_head')


def test_backbones_of_other_projects():
    cfg = Config(dict(model=dict(backbone=dict(type='ResNet', depth=18)), default_scope='mmdet'))
    target = build_other_target(cfg, 'backbone', 'resnet')
    assert target.needs_autocast and type(target.build()).__name__ == 'ResNet'
    with pytest.raises(ValueError, match="yolo: its model has no `backbone`, only \\['type'\\]"):
        build_other_target(Config(dict(model=dict(type='YOLO'))), 'backbone', 'yolo')


def test_tokens_for_a_neck_become_maps_where_there_is_no_neck():
    backbone = dict(type='mmtoken.STViTRSwin', out_type='tokens')
    cfg = Config(dict(model=dict(backbone=backbone, neck={}), default_scope='mmdet'))
    assert build_target(cfg, 'backbone').cfg['backbone']['out_type'] == 'map'
    assert build_target(cfg, 'model').cfg['backbone']['out_type'] == 'tokens'


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
    sparse = build_target(cfg, 'model', 0.5)
    assert sparse.name == 'GrainUnpoolNeck' and library_target(sparse) is None
    dense = dense_target(sparse)
    assert dense.routing == {} and dense.cfg['neck']['granularities'] == (1,)
    cost, twin_cost = (target.measure_cost(target.build(), IMAGES) for target in (sparse, dense))
    assert cost.macs < twin_cost.macs and twin_cost.ratios == {}
    assert cost.ratios['query_ratio'] == pytest.approx(0.5, abs=0.05)
    with pytest.raises(ValueError, match='no backbone of mmtoken'):
        build_target(cfg, 'backbone')


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
    sparse = build_target(cfg, part)
    assert sparse.name == 'STViTRSwin' and sparse.in_channels == channels
    for target in (
        sparse,
        dense_target(sparse),
        library_target(sparse),
        pickle.loads(pickle.dumps(sparse)),
    ):
        assert target.in_channels == channels
        target.build()(torch.zeros(1, channels, 64, 64))
    # As MMEngine writes it into a work dir
    cfg.dump(tmp_path / 'dump.py')
    assert build_target(load_config(tmp_path / 'dump.py'), part).name == 'STViTRSwin'


def test_bad_arguments():
    backbone = dict(type='mmtoken.STViTRSwin', arch='huge')
    cfg = Config(dict(model=dict(backbone=backbone), default_scope='mmdet'))
    with pytest.raises(ValueError, match="mmtoken.STViTRSwin cannot be built: .*'huge'"):
        build_target(cfg, 'backbone').build()


@pytest.mark.parametrize(
    'backbone, kind, message',
    [
        (dict(type='mmtoken.DGEPVT'), 'coarse_ratio', 'takes a query_ratio, got a coarse_ratio'),
        (dict(type='mmtoken.MSViT'), 'query_ratio', 'takes a coarse_ratio, got a query_ratio'),
        (dict(type='mmtoken.PSViT'), None, 'takes no ratio'),
        (dict(type='mmtoken.DGEPVT'), None, r'query_ratio must be in \(0, 1\], got 1.5'),
    ],
)
def test_ratios_that_a_network_does_not_take(backbone, kind, message):
    cfg = Config(dict(model=dict(backbone=backbone), default_scope='mmdet'))
    with pytest.raises(ValueError, match=message):
        build_target(cfg, 'backbone', 1.5, kind)
