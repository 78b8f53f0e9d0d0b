# A gate for a DeiT, which is trained on with it; for `train.py` of mmpretrain. The paper's are the
# 20 epochs (of the abstract's first version) and the pretrained network. Ours: the learning rates,
# DeiT's augmentation, the target, and how its loss sets in.
_base_ = [
    '../_base_/mmtoken.py',
    'mmpretrain::_base_/datasets/imagenet_bs64_swin_224.py',
    'mmpretrain::_base_/schedules/imagenet_bs1024_adamw_swin.py',
    'mmpretrain::_base_/default_runtime.py',
]

# mmpretrain's DeiT: in a file of mmpretrain the head's weights have its own names.
checkpoint = 'https://download.openmmlab.com/mmclassification/v0/deit/deit-tiny_pt-4xb256_in1k_20220218-13b382a0.pth'
custom_hooks = [dict(type='mmtoken.TokenLossHook')]
model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='mmtoken.MSViT',
        arch='tiny',
        gate=dict(
            loss=dict(type='mmtoken.BatchShapingLoss', target_coarse_ratio=0.5, warmup_iters=2500)
        ),
        out_type='cls_token',
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint),
    ),
    head=dict(
        type='VisionTransformerClsHead',
        num_classes=1000,
        in_channels=192,
        loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original'),
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint, prefix='head'),
    ),
    train_cfg=dict(augments=[dict(type='Mixup', alpha=0.8), dict(type='CutMix', alpha=1.0)]),
)
train_dataloader = dict(batch_size=128)
optim_wrapper = dict(
    optimizer=dict(lr=5e-5),
    paramwise_cfg=dict(
        custom_keys={
            'backbone.gate': dict(lr_mult=10.0),
            'backbone.gate_loss': dict(decay_mult=0.0),
            '.cls_token': dict(decay_mult=0.0),
            '.pos_embed': dict(decay_mult=0.0),
        }
    ),
    clip_grad=dict(max_norm=5.0),
)
train_cfg = dict(max_epochs=20)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=True, end=1, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=1e-6, by_epoch=True, begin=1),
]
