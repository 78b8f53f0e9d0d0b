_base_ = './upernet_stvit-r-swin-s_8xb2-160k_ade20k-512x512.py'

checkpoint = 'https://huggingface.co/csncsn/STViT-R/resolve/main/STViT-R-Swin-B.pth'
model = dict(
    backbone=dict(arch='base', init_cfg=dict(checkpoint=checkpoint)),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
