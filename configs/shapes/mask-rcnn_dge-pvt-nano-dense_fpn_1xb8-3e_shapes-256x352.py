# The dense twin: PVT, trained on as long.
_base_ = './mask-rcnn_dge-pvt-nano_fpn_1xb8-3e_shapes-256x352.py'

custom_hooks = []
model = dict(backbone=dict(granularities=(1,), budget=None))
