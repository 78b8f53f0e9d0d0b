# Mask R-CNN on a plain backbone, with ViTDet's simple feature pyramid. A config names the backbone.
_base_ = 'mmdet::_base_/models/mask-rcnn_r50_fpn.py'

# DeiT's ImageNet-1k weights
checkpoint = 'https://dl.fbaipublicfiles.com/deit/deit_small_patch16_224-cd65a155.pth'
model = dict(
    backbone=dict(
        _delete_=True,
        arch='small',
        drop_path_rate=0.1,
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint),
    ),
    neck=dict(
        _delete_=True,
        type='mmtoken.SimpleFeaturePyramid',
        in_channels=384,
        out_channels=256,
        num_outs=5,
    ),
    rpn_head=dict(num_convs=2),
)
