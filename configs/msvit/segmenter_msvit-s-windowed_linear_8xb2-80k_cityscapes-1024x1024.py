# Windows of 16 x 16 patches, four to a side, in all but four blocks.
_base_ = './segmenter_msvit-s_linear_8xb2-80k_cityscapes-1024x1024.py'

model = dict(backbone=dict(cls_token=False, window_size=16))
