# A plain backbone under ViTDet's simple feature pyramid.
_base_ = [
    '../_base_/mmtoken.py',
    'mmdet::_base_/models/mask-rcnn_r50_fpn.py',
    'mmdet::_base_/datasets/coco_instance.py',
    '../_base_/schedules/coco_adamw_1x.py',
    'mmdet::_base_/default_runtime.py',
]

# DeiT's ImageNet-1k weights. The authors have released DGE's: set this to your copy of them.
checkpoint = 'https://dl.fbaipublicfiles.com/deit/deit_small_patch16_224-cd65a155.pth'
custom_hooks = [dict(type='mmtoken.TokenLossHook')]
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmtoken.DGEDeiT',
        arch='small',
        budget=dict(type='mmtoken.BudgetLoss', target=0.5, loss_weight=1.0),
        drop_path_rate=0.1,
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint),
    ),
    neck=dict(
        _delete_=True,
        type='mmtoken.SimpleFeaturePyramid',
        in_channels=384,
        out_channels=256,
        num_outs=5,
    ),
    rpn_head=dict(num_convs=2),
)
optim_wrapper = dict(
    optimizer=dict(weight_decay=0.1),
    paramwise_cfg=dict(norm_decay_mult=0.0, custom_keys={'pos_embed': dict(decay_mult=0.0)}),
)
