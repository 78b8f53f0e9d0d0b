# For speed: a pyramid and a head that leave most of the time to the backbone, and a gate that
# boxes teach to keep half of the regions of each image fine.
_base_ = [
    '../_base_/mmtoken.py',
    '../_base_/models/atss_light.py',
    'mmdet::_base_/datasets/coco_detection.py',
    '../_base_/schedules/coco_vit_1x.py',
    'mmdet::_base_/default_runtime.py',
]

# DeiT's ImageNet-1k weights
checkpoint = 'https://dl.fbaipublicfiles.com/deit/deit_small_patch16_224-cd65a155.pth'
custom_hooks = [dict(type='mmtoken.TokenLossHook')]
model = dict(
    backbone=dict(
        type='mmtoken.MSViT',
        arch='small',
        gate=dict(
            input='patches',
            fine_ratio=0.5,
            kernel_size=5,
            label_loss=dict(type='mmtoken.LabelPurityLoss'),
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
        out_channels=96,
        num_outs=5,
        scales=(2.0, 1.0, 0.5),
    ),
)
