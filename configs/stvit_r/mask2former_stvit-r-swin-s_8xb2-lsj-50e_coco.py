_base_ = ['../_base_/mmtoken.py', 'mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco.py']

# ImageNet-1k classification weights, released by the authors of STViT-R.
checkpoint = 'https://huggingface.co/csncsn/STViT-R/resolve/main/STViT-R-Swin-S.pth'
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmtoken.STViTRSwin',
        arch='small',
        drop_path_rate=0.3,
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint),
    ),
    panoptic_head=dict(in_channels=[96, 192, 384, 768]),
)
