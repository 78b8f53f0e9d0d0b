# Strides 4 and 8 by ViTDet's transposed convolutions, which know nothing of planes.
_base_ = './upernet_swat-deit-s_8xb2-160k_ade20k-512x512.py'

model = dict(neck=dict(plane_size=None))
