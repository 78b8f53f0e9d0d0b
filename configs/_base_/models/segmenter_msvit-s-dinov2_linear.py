# MSViT from weights of DINOv2 with a linear head, for whole photographs. A quarter of the regions
# is fine; labels teach the gate which. The last four blocks are trained. Configs set the size of
# the photographs and the number of classes.
_base_ = './segmenter_vit-s_linear.py'

checkpoint = 'https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth'
model = dict(
    backbone=dict(
        type='mmtoken.MSViT',
        arch='small',
        coarse_size=28,
        fine_size=14,
        gate=dict(
            input='patches',
            fine_ratio=0.25,
            kernel_size=5,
            label_loss=dict(type='mmtoken.LabelPurityLoss'),
        ),
        train_mode='gathered',
        layer_scale=1e-5,
        img_size=518,  # as in the weights
        frozen_stages=8,
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint),
    ),
    test_cfg=dict(mode='whole'),
)
