# A plain ViT from scratch: what MSViT and its dense twin start from. MSViT without a gate is ViT.
_base_ = [
    '../_base_/mmtoken.py',
    '../_base_/models/shapes_mask-rcnn.py',
    '../_base_/datasets/shapes_instance.py',
    '../_base_/schedules/shapes_instance_7e.py',
    'mmdet::_base_/default_runtime.py',
]

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmtoken.MSViT',
        arch=dict(embed_dims=96, num_layers=6, num_heads=3, feedforward_channels=384),
        gate=None,
        cls_token=False,
        fine_size=8,
        coarse_size=16,
        img_size=(160, 224),
    ),
    # Maps of stride 8 to strides 4, 8, 16, 32 and 64
    neck=dict(
        _delete_=True,
        type='mmtoken.SimpleFeaturePyramid',
        in_channels=96,
        out_channels=64,
        num_outs=5,
        scales=(2.0, 1.0, 0.5),
    ),
)
train_cfg = dict(max_epochs=10, val_interval=10)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=75),
    dict(type='PolyLR', eta_min=1e-5, power=1.0, begin=75, end=750, by_epoch=False),
]
default_hooks = dict(logger=dict(interval=25), checkpoint=dict(max_keep_ckpts=1))
