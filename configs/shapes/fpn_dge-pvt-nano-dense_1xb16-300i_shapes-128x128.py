# The dense twin: PVT, trained on as long.
_base_ = './fpn_dge-pvt-nano_1xb16-300i_shapes-128x128.py'

custom_hooks = []
model = dict(backbone=dict(granularities=(1,), budget=None))
