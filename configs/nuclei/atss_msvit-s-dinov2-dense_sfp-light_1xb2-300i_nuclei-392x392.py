# The dense twin: ViT.
_base_ = './atss_msvit-s-dinov2_sfp-light_1xb2-300i_nuclei-392x392.py'

custom_hooks = []
model = dict(
    backbone=dict(gate=None, out_type='map'), neck=dict(type='mmtoken.SimpleFeaturePyramid')
)
