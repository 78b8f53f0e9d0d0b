_base_ = './segmenter_msvit-s_linear_8xb2-160k_ade20k-512x512.py'

checkpoint = 'https://dl.fbaipublicfiles.com/deit/deit_tiny_patch16_224-a1311bcf.pth'
model = dict(
    backbone=dict(arch='tiny', init_cfg=dict(checkpoint=checkpoint)),
    decode_head=dict(in_channels=192, channels=192),
)
