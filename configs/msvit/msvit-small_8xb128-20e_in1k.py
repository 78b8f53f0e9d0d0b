_base_ = './msvit-tiny_8xb128-20e_in1k.py'

checkpoint = 'https://download.openmmlab.com/mmclassification/v0/deit/deit-small_pt-4xb256_in1k_20220218-9425b9bb.pth'
model = dict(
    backbone=dict(arch='small', init_cfg=dict(checkpoint=checkpoint)),
    head=dict(in_channels=384, init_cfg=dict(checkpoint=checkpoint)),
)
