_base_ = './retinanet_dge-pvt-t_fpn_8xb2-1x_coco.py'

checkpoint = 'https://github.com/whai362/PVT/releases/download/v2/pvt_small.pth'
model = dict(backbone=dict(arch='small', init_cfg=dict(checkpoint=checkpoint)))
