"""Trained models of the libraries keep their scores when they become sparse, and train on.

The scenes are few, and tested on those trained on: a score says whether a network is the one that
was trained, not whether it is good.
"""

import pytest
from end_to_end import CONFIGS, ONE_PROCESS, TEST, TRAIN, run, scores, train

from mmtoken.conversion import sparsify

pytestmark = pytest.mark.e2e

BASES = CONFIGS / '_base_'
DETECTOR = f"""
_base_ = [
    '{BASES}/models/shapes_mask-rcnn.py',
    '{BASES}/datasets/shapes_instance.py',
    '{BASES}/schedules/shapes_instance_5e.py',
    'mmdet::_base_/default_runtime.py',
]
model = dict(
    backbone=dict(
        _delete_=True, type='PyramidVisionTransformer', embed_dims=32, num_layers=[1, 1, 2, 1],
        num_heads=[1, 2, 4, 8], mlp_ratios=[4, 4, 4, 4], drop_path_rate=0.0,
        pretrain_img_size=(160, 224),
    ),
)
train_dataloader = dict(batch_size=4)
val_dataloader = dict(
    dataset=dict(
        ann_file='annotations/instances_train2017.json', data_prefix=dict(img='train2017/')
    )
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file='data/shapes/coco/annotations/instances_train2017.json')
test_evaluator = val_evaluator
train_cfg = dict(max_epochs=30, val_interval=30)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=10)
]
default_hooks = dict(checkpoint=dict(interval=30))
"""
SEGMENTER = f"""
_base_ = [
    '{BASES}/models/shapes_semantic-fpn.py',
    '{BASES}/datasets/shapes_semantic.py',
    '{BASES}/schedules/shapes_semantic_500i.py',
    __import__('mmtoken') and 'mmseg::_base_/default_runtime.py',
]
model = dict(
    backbone=dict(
        _delete_=True, type='VisionTransformer', img_size=(128, 128), patch_size=8, embed_dims=96,
        num_layers=4, num_heads=3, mlp_ratio=4, out_indices=(3,),
        norm_cfg=dict(type='LN', eps=1e-6),
    ),
    neck=None,
    decode_head=dict(
        _delete_=True, type='FCNHead', in_channels=96, in_index=0, channels=64, num_convs=1,
        num_classes=9, norm_cfg=dict(type='BN'),
    ),
)
train_dataloader = dict(batch_size=4)
val_dataloader = dict(
    dataset=dict(
        data_prefix=dict(img_path='images/training', seg_map_path='annotations/training')
    )
)
test_dataloader = val_dataloader
train_cfg = dict(max_iters=150, val_interval=150)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=10)
]
default_hooks = dict(checkpoint=dict(interval=150))
"""


def train_stock(workspace, name, text):
    config = workspace / f'{name}.py'
    config.write_text(text)
    checkpoint, output = train(workspace, TRAIN, config, ONE_PROCESS)
    return config, checkpoint, output


@pytest.fixture(scope='session')
def detector(workspace):
    return train_stock(workspace, 'stock_detector', DETECTOR)


@pytest.fixture(scope='session')
def segmenter(workspace):
    return train_stock(workspace, 'stock_segmenter', SEGMENTER)


def scores_of_sparse(workspace, config, checkpoint, method, length, metric):
    """Right after, and after a short fine-tuning with the dense network as the teacher."""
    made = sparsify(str(config), method, workspace / 'sparse', str(checkpoint), finetune=length)
    [after] = scores(
        run(workspace, TEST, made.config, made.checkpoint, options=ONE_PROCESS), metric
    )
    [tuned] = scores(train(workspace, TRAIN, made.config, ONE_PROCESS)[1], metric)
    return after, tuned


def test_detector(workspace, detector):
    config, checkpoint, output = detector
    [dense] = scores(output, 'coco/bbox_mAP')
    assert dense > 0.15
    after, tuned = scores_of_sparse(workspace, config, checkpoint, 'dge', 6, 'coco/bbox_mAP')
    # Not to the last digit: PVT sees the padding of a batch, DGE does not.
    assert after == pytest.approx(dense, abs=0.03)
    assert tuned > dense - 0.03


@pytest.mark.parametrize(
    'method, change',
    [('msvit', 0.05), ('dge', 0.05), ('merge', 1.5)],  # whose choices start fine; pairs are merged
)
def test_segmenter(workspace, segmenter, method, change):
    config, checkpoint, output = segmenter
    [dense] = scores(output, 'mIoU')
    assert dense > 18  # a wall everywhere: 9
    after, tuned = scores_of_sparse(workspace, config, checkpoint, method, 30, 'mIoU')
    assert after == pytest.approx(dense, abs=change)
    assert tuned > dense - 1.5
