# The dense twin, which is Swin. Its ImageNet-1k weights are Microsoft's.
_base_ = './upernet_stvit-r-swin-b_8xb2-160k_ade20k-512x512.py'

checkpoint = 'https://github.com/SwinTransformer/storage/releases/download/v1.0.0/swin_base_patch4_window7_224.pth'
model = dict(
    backbone=dict(
        semantic_size=None,
        stem='patch',
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint),
    )
)
