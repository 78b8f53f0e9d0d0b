_base_ = [
    '../_base_/mmtoken.py',
    '../_base_/models/mask-rcnn_dge-pvt-t_fpn.py',
    '../_base_/datasets/coco_instance_1280x1280.py',
    '../_base_/schedules/coco_pvt_1x.py',
    'mmdet::_base_/default_runtime.py',
]

checkpoint = 'https://github.com/whai362/PVT/releases/download/v2/pvt_small.pth'
custom_hooks = [dict(type='mmtoken.TokenLossHook')]
model = dict(backbone=dict(arch='small', init_cfg=dict(checkpoint=checkpoint)))
