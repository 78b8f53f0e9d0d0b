# PVT's Semantic FPN with DGE in every block. In testing images are resized to a multiple of 32,
# as there.
_base_ = [
    '../_base_/mmtoken.py',
    'mmseg::_base_/models/fpn_r50.py',
    'mmseg::_base_/datasets/ade20k.py',
    '../_base_/schedules/ade20k_pvt_40k.py',
    'mmseg::_base_/default_runtime.py',
]

# PVT's ImageNet-1k weights: none of DGE on PVT were released.
checkpoint = 'https://github.com/whai362/PVT/releases/download/v2/pvt_tiny.pth'
custom_hooks = [dict(type='mmtoken.TokenLossHook')]
model = dict(
    data_preprocessor=dict(size=(512, 512)),
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
    decode_head=dict(num_classes=150),
)
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(2048, 512), keep_ratio=True),
    dict(type='ResizeToMultiple', size_divisor=32),
    dict(type='LoadAnnotations', reduce_zero_label=True),
    dict(type='PackSegInputs'),
]
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
