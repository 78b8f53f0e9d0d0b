# No weights were released for the tiny size: set model.backbone.init_cfg to your own.
_base_ = [
    '../_base_/mmtoken.py',
    '../_base_/models/mask-rcnn_stvit-r-swin-t_fpn.py',
    '../_base_/datasets/coco_instance_ms-crop.py',
    '../_base_/schedules/coco_adamw_3x.py',
    'mmdet::_base_/default_runtime.py',
]

optim_wrapper = dict(type='AmpOptimWrapper')
