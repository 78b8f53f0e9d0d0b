# The dense twin, which is ViT.
_base_ = './segmenter_msvit-s_mask_8xb2-160k_ade20k-512x512.py'

custom_hooks = []
model = dict(backbone=dict(gate=None))
