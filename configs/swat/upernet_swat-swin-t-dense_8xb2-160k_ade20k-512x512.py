# The dense twin, which is Swin. The weights that it starts from are its own.
_base_ = './upernet_swat-swin-t_8xb2-160k_ade20k-512x512.py'

model = dict(backbone=dict(structured=False))
