# The dense twin, which is EoMT on ViT.
_base_ = './eomt_msvit-s-dinov2_1xb2-2000i_nuclei-392x392.py'

custom_hooks = []
model = dict(backbone=dict(gate=None))
