# Crops of 1024 x 1024 pixels are trained, whole frames of 1024 x 2048 tested.
_base_ = [
    '../_base_/mmtoken.py',
    '../_base_/models/fpn_dge-pvt-t.py',
    'mmseg::_base_/datasets/cityscapes_1024x1024.py',
    '../_base_/schedules/cityscapes_pvt_80k.py',
    'mmseg::_base_/default_runtime.py',
]

checkpoint = 'https://github.com/whai362/PVT/releases/download/v2/pvt_small.pth'
custom_hooks = [dict(type='mmtoken.TokenLossHook')]
model = dict(
    data_preprocessor=dict(size=(1024, 1024)),
    backbone=dict(arch='small', init_cfg=dict(checkpoint=checkpoint)),
)
