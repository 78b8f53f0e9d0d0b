# The dense twin: every layer has an attention map of its own.
_base_ = './mask-rcnn_psvit-t_fpn_8xb2-1x_coco.py'

model = dict(backbone=dict(sharing=None))
