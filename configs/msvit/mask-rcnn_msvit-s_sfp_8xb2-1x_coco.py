# Attention is global in all blocks. It starts from DeiT: no weights of MSViT were released.
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
        type='mmtoken.MSViT',
        gate=dict(
            loss=dict(type='mmtoken.BatchShapingLoss', target_coarse_ratio=0.5, warmup_iters=4500)
        ),
        train_mode='gathered',
        cls_token=False,
        out_type='tokens',
    ),
    neck=dict(type='mmtoken.MixedScaleNeck'),
)
optim_wrapper = dict(
    paramwise_cfg=dict(
        custom_keys={
            'backbone.gate': dict(lr_mult=10.0),
            'backbone.gate_loss': dict(decay_mult=0.0),
        }
    )
)
