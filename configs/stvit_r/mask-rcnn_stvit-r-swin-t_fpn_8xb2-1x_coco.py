# No weights were released for the tiny size: set model.backbone.init_cfg to your own.
_base_ = [
    '../_base_/mmtoken.py',
    '../_base_/models/mask-rcnn_stvit-r-swin-t_fpn.py',
    'mmdet::_base_/datasets/coco_instance.py',
    '../_base_/schedules/coco_adamw_1x.py',
    'mmdet::_base_/default_runtime.py',
]
