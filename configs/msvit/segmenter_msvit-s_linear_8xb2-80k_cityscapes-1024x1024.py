# Attention is global: with half of the regions coarse, 2560 tokens instead of 4096.
_base_ = [
    '../_base_/mmtoken.py',
    '../_base_/common/segmenter-linear-80k_cityscapes-1024x1024.py',
]

# DeiT's ImageNet-1k weights: none of MSViT were released.
checkpoint = 'https://dl.fbaipublicfiles.com/deit/deit_small_patch16_224-cd65a155.pth'
custom_hooks = [dict(type='mmtoken.TokenLossHook')]
model = dict(
    backbone=dict(
        type='mmtoken.MSViT',
        arch='small',
        gate=dict(
            loss=dict(type='mmtoken.BatchShapingLoss', target_coarse_ratio=0.5, warmup_iters=4000)
        ),
        train_mode='gathered',
        drop_path_rate=0.1,
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint),
    )
)
optim_wrapper = dict(
    paramwise_cfg=dict(
        custom_keys={
            'backbone.gate': dict(lr_mult=10.0),
            'backbone.gate_loss': dict(decay_mult=0.0),
        }
    )
)
