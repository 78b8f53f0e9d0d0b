# UPerNet behind the same MSViT, as wide as the time of the encoder-only head allows.
_base_ = './segmenter_msvit-s-dinov2_linear_1xb4-150i_camvid-392x504.py'

model = dict(
    backbone=dict(out_indices=(2, 5, 8, 11), out_type='tokens'),
    neck=dict(
        type='mmtoken.MixedScaleNeck',
        in_channels=384,
        out_channels=128,
        num_outs=4,
        multi_level=True,
    ),
    decode_head=dict(
        _delete_=True,
        type='UPerHead',
        in_channels=[128, 128, 128, 128],
        in_index=[0, 1, 2, 3],
        pool_scales=(1, 2, 3, 6),
        channels=128,
        dropout_ratio=0.1,
        num_classes=11,
        norm_cfg=dict(type='SyncBN'),
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
    ),
)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={'neck': dict(lr_mult=10.0)}))
