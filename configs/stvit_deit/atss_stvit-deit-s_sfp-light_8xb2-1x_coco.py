# For speed: a pyramid and a head that leave most of the time to the backbone.
_base_ = [
    '../_base_/mmtoken.py',
    '../_base_/models/atss_light.py',
    'mmdet::_base_/datasets/coco_detection.py',
    '../_base_/schedules/coco_vit_1x.py',
    'mmdet::_base_/default_runtime.py',
]

# DeiT's ImageNet-1k weights: none of STViT on plain ViT were released.
checkpoint = 'https://dl.fbaipublicfiles.com/deit/deit_small_patch16_224-cd65a155.pth'
model = dict(
    backbone=dict(
        type='mmtoken.STViTDeiT',
        arch='small',
        drop_path_rate=0.1,
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint),
    ),
    neck=dict(
        _delete_=True,
        type='mmtoken.SimpleFeaturePyramid',
        in_channels=384,
        out_channels=96,
        num_outs=5,
        scales=(2.0, 1.0, 0.5),
    ),
)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={'centers': dict(decay_mult=0.0)}))
