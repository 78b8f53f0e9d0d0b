# For speed: a pyramid and a head that leave most of the time to the backbone.
_base_ = [
    '../_base_/mmtoken.py',
    '../_base_/models/atss_light.py',
    'mmdet::_base_/datasets/coco_detection.py',
    '../_base_/schedules/coco_pvt_1x.py',
    'mmdet::_base_/default_runtime.py',
]

checkpoint = 'https://github.com/whai362/PVT/releases/download/v2/pvt_small.pth'
custom_hooks = [dict(type='mmtoken.TokenLossHook')]
model = dict(
    backbone=dict(
        type='mmtoken.DGEPVT',
        arch='small',
        budget=dict(type='mmtoken.BudgetLoss', target=0.5, loss_weight=1.0),
        drop_path_rate=0.1,
        out_indices=(1, 2, 3),
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint),
    ),
    neck=dict(in_channels=[128, 320, 512], start_level=0),
)
optim_wrapper = dict(optimizer=dict(lr=1e-4))
