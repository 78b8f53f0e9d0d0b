# RTMDet-Ins of the small size. The backbone is pretrained: it learns a tenth as fast.
_base_ = ['../_base_/mmtoken.py', 'mmdet::rtmdet/rtmdet-ins_s_8xb32-300e_coco.py']

# ImageNet-1k classification weights, released by the authors of STViT-R.
checkpoint = 'https://huggingface.co/csncsn/STViT-R/resolve/main/STViT-R-Swin-S.pth'
model = dict(
    # RTMDet's own is that of CSPNeXt's weights
    data_preprocessor=dict(
        mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True
    ),
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
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={'backbone': dict(lr_mult=0.1)}))
auto_scale_lr = dict(base_batch_size=256)
