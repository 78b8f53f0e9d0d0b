_base_ = './mask-rcnn_stvit-deit-s_sfp_8xb2-1x_coco.py'

checkpoint = 'https://dl.fbaipublicfiles.com/deit/deit_tiny_patch16_224-a1311bcf.pth'
model = dict(
    backbone=dict(arch='tiny', init_cfg=dict(checkpoint=checkpoint)),
    neck=dict(in_channels=192),
)
