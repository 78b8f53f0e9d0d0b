# The dense twin, which is ViT.
_base_ = './mask-rcnn_msvit-s_sfp_8xb2-lsj-100e_coco.py'

custom_hooks = []
model = dict(
    backbone=dict(gate=None, out_type='map'), neck=dict(type='mmtoken.SimpleFeaturePyramid')
)
