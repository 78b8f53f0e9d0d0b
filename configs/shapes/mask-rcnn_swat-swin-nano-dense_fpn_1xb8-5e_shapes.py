# The plain counterpart: Swin.
_base_ = './mask-rcnn_swat-swin-nano_fpn_1xb8-5e_shapes.py'

model = dict(backbone=dict(structured=False))
