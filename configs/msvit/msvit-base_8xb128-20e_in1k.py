# Converted from Facebook's. With stochastic depth, as it was trained.
_base_ = './msvit-tiny_8xb128-20e_in1k.py'

checkpoint = 'https://download.openmmlab.com/mmclassification/v0/deit/deit-base_3rdparty_pt-16xb64_in1k_20211124-6f40c188.pth'
model = dict(
    backbone=dict(arch='base', drop_path_rate=0.1, init_cfg=dict(checkpoint=checkpoint)),
    head=dict(in_channels=768, init_cfg=dict(checkpoint=checkpoint)),
)
