# MSViT from weights of DINOv2 with a light head. A quarter of the regions is fine; masks teach the
# gate which. The last four blocks are trained.
_base_ = [
    '../_base_/mmtoken.py',
    '../_base_/models/nuclei_atss-light.py',
    '../_base_/datasets/nuclei_392x392.py',
    '../_base_/schedules/nuclei_300i.py',
]

checkpoint = 'https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth'
custom_hooks = [dict(type='mmtoken.TokenLossHook')]
model = dict(
    data_preprocessor=dict(pad_size_divisor=28),
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
        out_type='tokens',
        frozen_stages=8,
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint),
    ),
    neck=dict(
        _delete_=True,
        type='mmtoken.MixedScaleNeck',
        in_channels=384,
        out_channels=96,
        num_outs=5,
        scales=(2.0, 1.0, 0.5),
    ),
    bbox_head=dict(anchor_generator=dict(strides=[7, 14, 28, 56, 112])),
)
val_evaluator = dict(metric='bbox')
test_evaluator = val_evaluator
optim_wrapper = dict(
    paramwise_cfg=dict(custom_keys={'neck': dict(lr_mult=10.0), 'bbox_head': dict(lr_mult=10.0)})
)
