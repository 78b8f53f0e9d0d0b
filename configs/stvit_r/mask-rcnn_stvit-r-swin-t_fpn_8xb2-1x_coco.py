# No weights were released for the tiny size: set model.backbone.init_cfg to your own.
_base_ = [
    '../_base_/mmtoken.py',
    'mmdet::_base_/models/mask-rcnn_r50_fpn.py',
    'mmdet::_base_/datasets/coco_instance.py',
    '../_base_/schedules/coco_adamw_1x.py',
    'mmdet::_base_/default_runtime.py',
]

model = dict(
    backbone=dict(_delete_=True, type='mmtoken.STViTRSwin', arch='tiny', drop_path_rate=0.2),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
