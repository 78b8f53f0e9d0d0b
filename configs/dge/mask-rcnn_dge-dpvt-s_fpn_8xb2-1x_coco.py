# No weights of deformable PVT were released: set model.backbone.init_cfg to your own.
_base_ = './mask-rcnn_dge-pvt-t_fpn_8xb2-1x_coco.py'

model = dict(backbone=dict(type='mmtoken.DGEDPVT', arch='small', init_cfg=None))
