_base_ = './retinanet_psvit-t_fpn_8xb2-1x_coco.py'

model = dict(backbone=dict(arch='small'), neck=dict(in_channels=[192, 384, 768]))
