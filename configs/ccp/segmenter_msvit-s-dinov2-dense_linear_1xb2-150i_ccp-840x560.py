# The dense twin, which is ViT.
_base_ = './segmenter_msvit-s-dinov2_linear_1xb2-150i_ccp-840x560.py'

custom_hooks = []
model = dict(backbone=dict(gate=None))
