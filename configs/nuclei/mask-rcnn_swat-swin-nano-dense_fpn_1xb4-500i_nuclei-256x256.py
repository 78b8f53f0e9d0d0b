# The plain counterpart: Swin.
_base_ = './mask-rcnn_swat-swin-nano_fpn_1xb4-500i_nuclei-256x256.py'

model = dict(backbone=dict(structured=False))
