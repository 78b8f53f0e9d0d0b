# Attention is global in all blocks: with half of the regions coarse, 4000 tokens instead of 6400.
_base_ = './mask-rcnn_msvit-s_sfp_8xb2-lsj-100e_coco-1280x1280.py'

model = dict(backbone=dict(window_size=None))
