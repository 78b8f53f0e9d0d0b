# The dense twin: ordinary Swin blocks in place of semantic tokens.
_base_ = './mask-rcnn_stvit-r-swin-nano_fpn_1xb4-500i_nuclei-256x256.py'

model = dict(backbone=dict(semantic_size=None))
