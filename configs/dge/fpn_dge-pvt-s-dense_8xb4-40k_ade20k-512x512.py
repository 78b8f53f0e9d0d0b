# The dense twin, which is PVT.
_base_ = './fpn_dge-pvt-s_8xb4-40k_ade20k-512x512.py'

custom_hooks = []
model = dict(backbone=dict(granularities=(1,), budget=None))
