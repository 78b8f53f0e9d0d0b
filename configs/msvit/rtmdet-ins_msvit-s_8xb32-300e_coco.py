# RTMDet-Ins of the small size, with all of its hooks (EMA, pipeline switch). The backbone is
# pretrained and learns a tenth as fast as the rest; its gate is new.
_base_ = ['../_base_/mmtoken.py', 'mmdet::rtmdet/rtmdet-ins_s_8xb32-300e_coco.py']

# DeiT's ImageNet-1k weights
checkpoint = 'https://dl.fbaipublicfiles.com/deit/deit_small_patch16_224-cd65a155.pth'
# A list replaces that of the base; this one extends it.
custom_hooks = [*_base_.custom_hooks, dict(type='mmtoken.TokenLossHook')]
model = dict(
    # RTMDet's own is that of CSPNeXt's weights
    data_preprocessor=dict(
        mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True
    ),
    backbone=dict(
        _delete_=True,
        type='mmtoken.MSViT',
        arch='small',
        gate=dict(
            input='patches',
            fine_ratio=0.5,
            kernel_size=5,
            label_loss=dict(type='mmtoken.LabelPurityLoss'),
        ),
        train_mode='gathered',
        cls_token=False,
        drop_path_rate=0.1,
        out_type='tokens',
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint),
    ),
    neck=dict(
        _delete_=True,
        type='mmtoken.MixedScaleNeck',
        in_channels=384,
        out_channels=128,
        num_outs=3,
        scales=(2.0, 1.0, 0.5),
    ),
)
optim_wrapper = dict(
    paramwise_cfg=dict(
        custom_keys={
            'backbone': dict(lr_mult=0.1),
            'backbone.gate': dict(lr_mult=1.0),
        }
    )
)
auto_scale_lr = dict(base_batch_size=256)
