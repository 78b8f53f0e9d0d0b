# The dense twin: every layer has an attention map of its own.
_base_ = './fpn_psvit-t_8xb4-40k_ade20k-512x512.py'

model = dict(backbone=dict(sharing=None))
