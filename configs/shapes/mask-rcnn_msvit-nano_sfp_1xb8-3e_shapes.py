# MSViT from the weights of ViT: regions of 16 pixels become one token, or four of 8 pixels.
_base_ = './mask-rcnn_vit-nano_sfp_1xb8-10e_shapes.py'

load_from = 'work_dirs/mask-rcnn_vit-nano_sfp_1xb8-10e_shapes/epoch_10.pth'
custom_hooks = [dict(type='mmtoken.TokenLossHook')]
model = dict(
    backbone=dict(
        gate=dict(
            _delete_=True,
            input='pixels',
            hidden_channels=128,
            start_ratio=0.5,
            loss=dict(
                type='mmtoken.BatchShapingLoss',
                target_coarse_ratio=0.5,
                loss_weight=6.0,
                temperature=0.15,
                warmup_iters=60,
            ),
        ),
        share_patch_embed=False,
        out_type='tokens',
    ),
    neck=dict(type='mmtoken.MixedScaleNeck', refine=True),
)
train_cfg = dict(max_epochs=3, val_interval=3)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=30),
    dict(type='PolyLR', eta_min=0.0, power=1.0, begin=30, end=225, by_epoch=False),
]
optim_wrapper = dict(
    optimizer=dict(lr=5e-4),
    paramwise_cfg=dict(
        custom_keys={
            'backbone.gate': dict(lr_mult=10.0),
            'backbone.gate_loss': dict(decay_mult=0.0),
        }
    ),
)
