_base_ = './mask-rcnn_msvit-s_sfp_8xb2-lsj-100e_coco.py'

checkpoint = 'https://dl.fbaipublicfiles.com/deit/deit_base_patch16_224-b5f2ef4d.pth'
model = dict(
    backbone=dict(arch='base', init_cfg=dict(checkpoint=checkpoint)),
    neck=dict(in_channels=768),
)
