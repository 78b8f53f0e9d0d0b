# A plain backbone under ViTDet's simple feature pyramid; attention is global in all blocks.
_base_ = [
    '../_base_/mmtoken.py',
    'mmdet::_base_/models/mask-rcnn_r50_fpn.py',
    'mmdet::_base_/datasets/coco_instance.py',
    '../_base_/schedules/coco_adamw_1x.py',
    'mmdet::_base_/default_runtime.py',
]

# DeiT's ImageNet-1k weights: none of MSViT were released. For others see the README.
checkpoint = 'https://dl.fbaipublicfiles.com/deit/deit_small_patch16_224-cd65a155.pth'
custom_hooks = [dict(type='mmtoken.TokenLossHook')]
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmtoken.MSViT',
        arch='small',
        gate=dict(
            loss=dict(type='mmtoken.BatchShapingLoss', target_coarse_ratio=0.5, warmup_iters=4500)
        ),
        train_mode='gathered',
        cls_token=False,
        drop_path_rate=0.1,
        out_type='tokens',
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint),
    ),
    neck=dict(
        _delete_=True,
        type='mmtoken.MixedScaleNeck',
        in_channels=384,
        out_channels=256,
        num_outs=5,
    ),
    rpn_head=dict(num_convs=2),
)
optim_wrapper = dict(
    optimizer=dict(weight_decay=0.1),
    paramwise_cfg=dict(
        norm_decay_mult=0.0,
        custom_keys={
            'backbone.gate': dict(lr_mult=10.0),
            'backbone.gate_loss': dict(decay_mult=0.0),
            'pos_embed': dict(decay_mult=0.0),
        },
    ),
)
