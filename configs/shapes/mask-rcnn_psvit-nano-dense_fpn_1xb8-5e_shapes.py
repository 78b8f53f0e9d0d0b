# The dense twin: every layer computes its own attention.
_base_ = './mask-rcnn_psvit-nano_fpn_1xb8-5e_shapes.py'

model = dict(backbone=dict(sharing=None))
