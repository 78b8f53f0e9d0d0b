# PVT's Semantic FPN with DGE in every block. It needs mmtoken.TokenLossHook.
_base_ = 'mmseg::_base_/models/fpn_r50.py'

# PVT's ImageNet-1k weights: none of DGE on PVT were released.
checkpoint = 'https://github.com/whai362/PVT/releases/download/v2/pvt_tiny.pth'
model = dict(
    pretrained=None,
    backbone=dict(
        _delete_=True,
        type='mmtoken.DGEPVT',
        arch='tiny',
        budget=dict(type='mmtoken.BudgetLoss', target=0.5, loss_weight=1.0),
        drop_path_rate=0.1,
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint),
    ),
    neck=dict(in_channels=[64, 128, 320, 512]),
)
