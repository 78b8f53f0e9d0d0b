# The dense twin, which is PVT.
_base_ = './mask-rcnn_dge-pvt-s_fpn_8xb2-1x_coco.py'

custom_hooks = []
model = dict(backbone=dict(granularities=(1,), budget=None))
