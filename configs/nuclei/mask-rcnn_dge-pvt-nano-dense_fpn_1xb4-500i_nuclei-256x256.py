# The dense twin: PVT.
_base_ = './mask-rcnn_dge-pvt-nano_fpn_1xb4-500i_nuclei-256x256.py'

custom_hooks = []
model = dict(backbone=dict(granularities=(1,), budget=None))
