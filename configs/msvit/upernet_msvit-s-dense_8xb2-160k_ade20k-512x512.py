# The dense twin, which is ViT.
_base_ = './upernet_msvit-s_8xb2-160k_ade20k-512x512.py'

custom_hooks = []
model = dict(
    backbone=dict(gate=None, out_type='map'), neck=dict(type='mmtoken.SimpleFeaturePyramid')
)
