_base_ = [
    '../_base_/mmtoken.py',
    '../_base_/models/mask-rcnn_dge-pvt-t_fpn.py',
    'mmdet::_base_/datasets/coco_instance.py',
    '../_base_/schedules/coco_pvt_1x.py',
    'mmdet::_base_/default_runtime.py',
]

custom_hooks = [dict(type='mmtoken.TokenLossHook')]
