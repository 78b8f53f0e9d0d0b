# No weights of PSViT were released, and no others fit: set model.backbone.init_cfg to your own.
_base_ = [
    '../_base_/mmtoken.py',
    'mmdet::_base_/models/mask-rcnn_r50_fpn.py',
    'mmdet::_base_/datasets/coco_instance.py',
    '../_base_/schedules/coco_adamw_1x.py',
    'mmdet::_base_/default_runtime.py',
]

model = dict(
    backbone=dict(
        _delete_=True, type='mmtoken.PSViT', arch='tiny', finest_map=True, drop_path_rate=0.1
    ),
    neck=dict(in_channels=[96, 96, 192, 384]),
)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={'pos_embed': dict(decay_mult=0.0)}))
