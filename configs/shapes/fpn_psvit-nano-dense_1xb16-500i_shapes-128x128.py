# The dense twin: every layer computes its own attention.
_base_ = './fpn_psvit-nano_1xb16-500i_shapes-128x128.py'

model = dict(backbone=dict(sharing=None))
