_base_ = './mask-rcnn_stvit-r-swin-s_fpn_8xb2-1x_coco.py'

checkpoint = 'https://huggingface.co/csncsn/STViT-R/resolve/main/STViT-R-Swin-B.pth'
model = dict(
    backbone=dict(arch='base', drop_path_rate=0.3, init_cfg=dict(checkpoint=checkpoint)),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
