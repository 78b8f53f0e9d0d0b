_base_ = './fpn_psvit-t_8xb4-40k_ade20k-512x512.py'

model = dict(backbone=dict(arch='small'), neck=dict(in_channels=[192, 192, 384, 768]))
