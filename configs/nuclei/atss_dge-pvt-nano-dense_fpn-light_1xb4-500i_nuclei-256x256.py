# The dense twin: PVT.
_base_ = './atss_dge-pvt-nano_fpn-light_1xb4-500i_nuclei-256x256.py'

custom_hooks = []
model = dict(backbone=dict(granularities=(1,), budget=None))
