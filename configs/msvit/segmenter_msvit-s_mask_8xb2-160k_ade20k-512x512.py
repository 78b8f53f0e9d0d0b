# Segmenter's mask transformer on the map of the last block, which holds each coarse token four
# times. AdamW instead of Segmenter's SGD, as with the other plain backbones here.
_base_ = [
    '../_base_/mmtoken.py',
    'mmseg::_base_/models/segmenter_vit-b16_mask.py',
    'mmseg::_base_/datasets/ade20k.py',
    '../_base_/schedules/ade20k_msvit_160k.py',
    'mmseg::_base_/default_runtime.py',
]

# DeiT's ImageNet-1k weights: none of MSViT were released. For others see the README.
checkpoint = 'https://dl.fbaipublicfiles.com/deit/deit_small_patch16_224-cd65a155.pth'
custom_hooks = [dict(type='mmtoken.TokenLossHook')]
model = dict(
    data_preprocessor=dict(
        size=(512, 512), mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375]
    ),
    pretrained=None,
    backbone=dict(
        _delete_=True,
        type='mmtoken.MSViT',
        arch='small',
        gate=dict(
            loss=dict(type='mmtoken.BatchShapingLoss', target_coarse_ratio=0.5, warmup_iters=8000)
        ),
        drop_path_rate=0.1,
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint),
    ),
    decode_head=dict(in_channels=384, channels=384, embed_dims=384, num_heads=6),
)
train_dataloader = dict(batch_size=2)
