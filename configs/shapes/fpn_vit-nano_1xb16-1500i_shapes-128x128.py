# A plain ViT from scratch: what MSViT and its dense twin start from. MSViT without a gate is ViT.
_base_ = [
    '../_base_/mmtoken.py',
    '../_base_/models/shapes_semantic-fpn.py',
    '../_base_/datasets/shapes_semantic.py',
    '../_base_/schedules/shapes_semantic_750i.py',
    'mmseg::_base_/default_runtime.py',
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
        img_size=128,
        out_indices=(1, 3, 5),
    ),
    # Maps of stride 8 to strides 4, 8 and 16
    neck=dict(
        _delete_=True,
        type='mmtoken.SimpleFeaturePyramid',
        in_channels=96,
        out_channels=64,
        num_outs=3,
        scales=(2.0, 1.0, 0.5),
        multi_level=True,
    ),
    decode_head=dict(
        in_channels=[64, 64, 64], in_index=[0, 1, 2], feature_strides=[4, 8, 16], channels=64
    ),
)
train_cfg = dict(max_iters=1500, val_interval=1500)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=75),
    dict(type='PolyLR', eta_min=0.0, power=1.0, begin=75, end=1500, by_epoch=False),
]
default_hooks = dict(checkpoint=dict(interval=1500))
