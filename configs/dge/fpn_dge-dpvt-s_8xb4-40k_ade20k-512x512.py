# No weights of deformable PVT were released: set model.backbone.init_cfg to your own.
_base_ = './fpn_dge-pvt-t_8xb4-40k_ade20k-512x512.py'

model = dict(backbone=dict(type='mmtoken.DGEDPVT', arch='small', init_cfg=None))
