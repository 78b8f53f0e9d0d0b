# The plain counterpart: DeiT without a class token.
_base_ = './fpn_swat-deit-nano-sfp_1xb16-500i_shapes-128x128.py'

model = dict(backbone=dict(structured=False))
