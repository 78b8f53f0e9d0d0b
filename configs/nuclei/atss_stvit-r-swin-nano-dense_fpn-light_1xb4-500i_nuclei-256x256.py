# The dense twin: ordinary Swin blocks in place of semantic tokens.
_base_ = './atss_stvit-r-swin-nano_fpn-light_1xb4-500i_nuclei-256x256.py'

model = dict(backbone=dict(semantic_size=None))
