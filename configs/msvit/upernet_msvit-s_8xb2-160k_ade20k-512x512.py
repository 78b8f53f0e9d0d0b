# Four taps, as with mmseg's UPerNet on DeiT. The neck copies coarse tokens to their places.
_base_ = [
    '../_base_/mmtoken.py',
    'mmseg::_base_/models/upernet_vit-b16_ln_mln.py',
    'mmseg::_base_/datasets/ade20k.py',
    '../_base_/schedules/ade20k_msvit_160k.py',
    'mmseg::_base_/default_runtime.py',
]

# DeiT's ImageNet-1k weights: none of MSViT were released. For others see the README.
checkpoint = 'https://dl.fbaipublicfiles.com/deit/deit_small_patch16_224-cd65a155.pth'
custom_hooks = [dict(type='mmtoken.TokenLossHook')]
model = dict(
    data_preprocessor=dict(size=(512, 512)),
    pretrained=None,
    backbone=dict(
        _delete_=True,
        type='mmtoken.MSViT',
        arch='small',
        gate=dict(
            loss=dict(type='mmtoken.BatchShapingLoss', target_coarse_ratio=0.5, warmup_iters=8000)
        ),
        drop_path_rate=0.1,
        out_indices=(2, 5, 8, 11),
        out_type='tokens',
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint),
    ),
    neck=dict(
        _delete_=True,
        type='mmtoken.MixedScaleNeck',
        in_channels=384,
        out_channels=384,
        num_outs=4,
        multi_level=True,
    ),
    decode_head=dict(in_channels=[384, 384, 384, 384], num_classes=150),
    auxiliary_head=dict(in_channels=384, num_classes=150),
)
train_dataloader = dict(batch_size=2)
