# The plain counterpart: Swin.
_base_ = './fpn_swat-swin-nano_1xb16-500i_shapes-128x128.py'

model = dict(backbone=dict(structured=False))
