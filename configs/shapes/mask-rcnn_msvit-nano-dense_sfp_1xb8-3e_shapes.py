# The dense twin: ViT, trained on as long.
_base_ = './mask-rcnn_msvit-nano_sfp_1xb8-3e_shapes.py'

custom_hooks = []
model = dict(
    backbone=dict(gate=None, out_type='map'), neck=dict(type='mmtoken.SimpleFeaturePyramid')
)
