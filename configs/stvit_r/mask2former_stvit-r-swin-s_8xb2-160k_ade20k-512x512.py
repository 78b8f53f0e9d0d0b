_base_ = __import__('mmtoken') and 'mmseg::mask2former/mask2former_r50_8xb2-160k_ade20k-512x512.py'

# Its parts are mmdet's.
custom_imports = dict(imports=['mmtoken', 'mmdet.models'], allow_failed_imports=False)
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
    decode_head=dict(in_channels=[96, 192, 384, 768]),
)
