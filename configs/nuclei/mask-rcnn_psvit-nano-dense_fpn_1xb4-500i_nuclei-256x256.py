# The dense twin: every layer computes its own attention.
_base_ = './mask-rcnn_psvit-nano_fpn_1xb4-500i_nuclei-256x256.py'

model = dict(backbone=dict(sharing=None))
