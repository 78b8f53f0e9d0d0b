# The dense twin: ordinary Swin blocks in place of semantic tokens.
_base_ = './upernet_stvit-r-swin-nano_1xb16-750i_shapes-128x128.py'

model = dict(backbone=dict(semantic_size=None))
