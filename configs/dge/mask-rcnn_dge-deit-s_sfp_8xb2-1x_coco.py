# It starts from DeiT. The authors have released DGE's weights: set `init_cfg` to your copy of them.
_base_ = [
    '../_base_/mmtoken.py',
    '../_base_/models/mask-rcnn_vit-s_sfp.py',
    'mmdet::_base_/datasets/coco_instance.py',
    '../_base_/schedules/coco_vit_1x.py',
    'mmdet::_base_/default_runtime.py',
]

custom_hooks = [dict(type='mmtoken.TokenLossHook')]
model = dict(
    backbone=dict(
        type='mmtoken.DGEDeiT',
        budget=dict(type='mmtoken.BudgetLoss', target=0.5, loss_weight=1.0),
    )
)
