# The dense twin, which is ViT.
_base_ = './segmenter_msvit-s-dinov2_linear_1xb4-150i_camvid-392x504.py'

custom_hooks = []
model = dict(backbone=dict(gate=None))
