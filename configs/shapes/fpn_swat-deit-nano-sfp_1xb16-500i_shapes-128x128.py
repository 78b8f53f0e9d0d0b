# The finest map by a transposed convolution, as in ViTDet.
_base_ = './fpn_swat-deit-nano_1xb16-500i_shapes-128x128.py'

model = dict(neck=dict(plane_size=None))
