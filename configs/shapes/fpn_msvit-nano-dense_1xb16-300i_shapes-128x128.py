# The dense twin: ViT, trained on as long.
_base_ = './fpn_msvit-nano_1xb16-300i_shapes-128x128.py'

custom_hooks = []
model = dict(
    backbone=dict(gate=None, out_type='map'), neck=dict(type='mmtoken.SimpleFeaturePyramid')
)
