# The dense twin: ordinary Swin blocks in place of semantic tokens.
_base_ = './mask-rcnn_stvit-r-swin-nano_fpn_1xb8-7e_shapes-256x352.py'

model = dict(backbone=dict(semantic_size=None))
