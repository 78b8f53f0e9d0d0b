_base_ = ['../_base_/mmtoken.py', 'mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py']

# ImageNet-1k classification weights, released by the authors of STViT-R.
checkpoint = 'https://huggingface.co/csncsn/STViT-R/resolve/main/STViT-R-Swin-S.pth'
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmtoken.STViTRSwin',
        arch='small',
        drop_path_rate=0.3,
        out_indices=(1, 2, 3),
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint),
    ),
    neck=dict(in_channels=[192, 384, 768]),
)
