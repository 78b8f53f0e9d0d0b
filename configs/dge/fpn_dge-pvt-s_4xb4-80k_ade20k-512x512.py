_base_ = './fpn_dge-pvt-t_4xb4-80k_ade20k-512x512.py'

checkpoint = 'https://github.com/whai362/PVT/releases/download/v2/pvt_small.pth'
model = dict(backbone=dict(arch='small', init_cfg=dict(checkpoint=checkpoint)))
