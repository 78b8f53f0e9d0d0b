# The dense twin, which is EoMT on ViT.
_base_ = './eomt_msvit-s-dinov2_1xb4-150i_camvid-392x504.py'

custom_hooks = []
model = dict(backbone=dict(gate=None))
