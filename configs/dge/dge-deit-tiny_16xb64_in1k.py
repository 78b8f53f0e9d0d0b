# ImageNet-1k by the released recipe, at 256 pixels; for `train.py` of mmpretrain.
_base_ = [
    '../_base_/mmtoken.py',
    'mmpretrain::_base_/datasets/imagenet_bs64_swin_256.py',
    'mmpretrain::_base_/schedules/imagenet_bs1024_adamw_swin.py',
    'mmpretrain::_base_/default_runtime.py',
]

custom_hooks = [dict(type='mmtoken.TokenLossHook')]
model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='mmtoken.DGEDeiT',
        arch='tiny',
        budget=dict(type='mmtoken.BudgetLoss', target=0.5, loss_weight=1.0, num_classes=1000),
        cls_token=True,
        img_size=256,
        drop_path_rate=0.1,
        out_type='cls_token',
    ),
    head=dict(
        type='LinearClsHead',
        num_classes=1000,
        in_channels=192,
        loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original'),
    ),
    train_cfg=dict(augments=[dict(type='Mixup', alpha=0.8), dict(type='CutMix', alpha=1.0)]),
)
optim_wrapper = dict(
    paramwise_cfg=dict(
        custom_keys={'.cls_token': dict(decay_mult=0.0), '.pos_embed': dict(decay_mult=0.0)}
    )
)
