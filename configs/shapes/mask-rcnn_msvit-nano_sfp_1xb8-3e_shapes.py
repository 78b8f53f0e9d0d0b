# MSViT from the weights of ViT: regions of 16 pixels become one token, or four of 8 pixels,
# as labels teach.
_base_ = './mask-rcnn_vit-nano_sfp_1xb8-10e_shapes.py'

load_from = 'work_dirs/mask-rcnn_vit-nano_sfp_1xb8-10e_shapes/epoch_10.pth'
custom_hooks = [dict(type='mmtoken.TokenLossHook')]
model = dict(
    backbone=dict(
        gate=dict(
            _delete_=True,
            input='patches',
            fine_ratio=0.5,
            kernel_size=3,
            label_loss=dict(type='mmtoken.LabelPurityLoss'),
        ),
        share_patch_embed=False,
        train_mode='gathered',
        out_type='tokens',
    ),
    neck=dict(type='mmtoken.MixedScaleNeck', refine=True),
)
train_cfg = dict(max_epochs=3, val_interval=3)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=30),
    dict(type='PolyLR', eta_min=0.0, power=1.0, begin=30, end=225, by_epoch=False),
]
optim_wrapper = dict(optimizer=dict(lr=5e-4))
