# MSViT from the weights of ViT: regions of 16 pixels become one token, or four of 8 pixels.
_base_ = './fpn_vit-nano_1xb16-1500i_shapes-128x128.py'

load_from = 'work_dirs/fpn_vit-nano_1xb16-1500i_shapes-128x128/iter_1500.pth'
custom_hooks = [dict(type='mmtoken.TokenLossHook')]
model = dict(
    backbone=dict(
        gate=dict(
            _delete_=True,
            loss=dict(
                type='mmtoken.BatchShapingLoss',
                target_coarse_ratio=0.5,
                loss_weight=4.0,
                temperature=0.15,
                warmup_iters=30,
            ),
        ),
        share_patch_embed=False,
        out_type='tokens',
    ),
    neck=dict(type='mmtoken.MixedScaleNeck', refine=True),
)
train_cfg = dict(max_iters=300, val_interval=300)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=30),
    dict(type='PolyLR', eta_min=0.0, power=1.0, begin=30, end=300, by_epoch=False),
]
default_hooks = dict(checkpoint=dict(interval=300))
optim_wrapper = dict(
    optimizer=dict(lr=5e-4),
    paramwise_cfg=dict(
        custom_keys={
            'backbone.gate': dict(lr_mult=10.0),
            'backbone.gate_loss': dict(decay_mult=0.0),
        }
    ),
)
