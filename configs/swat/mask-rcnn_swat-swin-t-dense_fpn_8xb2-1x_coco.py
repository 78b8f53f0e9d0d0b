# The dense twin, which is Swin. The weights that it starts from are its own.
_base_ = './mask-rcnn_swat-swin-t_fpn_8xb2-1x_coco.py'

model = dict(backbone=dict(structured=False))
