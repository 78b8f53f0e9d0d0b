_base_ = './segmenter_msvit-s_mask_8xb2-160k_ade20k-512x512.py'

checkpoint = 'https://dl.fbaipublicfiles.com/deit/deit_base_patch16_224-b5f2ef4d.pth'
model = dict(
    backbone=dict(arch='base', init_cfg=dict(checkpoint=checkpoint)),
    decode_head=dict(in_channels=768, channels=768, embed_dims=768, num_heads=12),
)
