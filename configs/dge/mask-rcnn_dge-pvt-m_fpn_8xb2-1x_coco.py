# Without stochastic depth, as PVT's detectors of this size.
_base_ = './mask-rcnn_dge-pvt-t_fpn_8xb2-1x_coco.py'

checkpoint = 'https://github.com/whai362/PVT/releases/download/v2/pvt_medium.pth'
model = dict(backbone=dict(arch='medium', drop_path_rate=0.0, init_cfg=dict(checkpoint=checkpoint)))
