# ImageNet-1k by the released recipe; for `train.py` of mmpretrain.
_base_ = ['../_base_/mmtoken.py', '../_base_/common/swat-310e_in1k.py']

model = dict(
    type='ImageClassifier',
    backbone=dict(type='mmtoken.SWATDeiT', arch='tiny', out_type='avg_featmap'),
    head=dict(
        type='LinearClsHead',
        num_classes=1000,
        in_channels=192,
        loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original'),
    ),
    train_cfg=dict(augments=[dict(type='Mixup', alpha=0.5), dict(type='CutMix', alpha=1.0)]),
)
