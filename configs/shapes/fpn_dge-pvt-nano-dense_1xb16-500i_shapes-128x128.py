# The dense twin: PVT.
_base_ = './fpn_dge-pvt-nano_1xb16-500i_shapes-128x128.py'

custom_hooks = []
model = dict(backbone=dict(granularities=(1,), budget=None))
