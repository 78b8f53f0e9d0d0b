# The backbone learns a tenth as fast as the rest, as in the base; its gate is new.
_base_ = __import__('mmtoken') and 'mmseg::mask2former/mask2former_r50_8xb2-160k_ade20k-512x512.py'

# Its parts are mmdet's.
custom_imports = dict(imports=['mmtoken', 'mmdet.models'], allow_failed_imports=False)
# DeiT's ImageNet-1k weights
checkpoint = 'https://dl.fbaipublicfiles.com/deit/deit_small_patch16_224-cd65a155.pth'
custom_hooks = [dict(type='mmtoken.TokenLossHook')]
model = dict(
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
        type='mmtoken.MixedScaleNeck',
        in_channels=384,
        out_channels=256,
        num_outs=4,
    ),
    decode_head=dict(in_channels=[256, 256, 256, 256]),
)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={'backbone.gate': dict(lr_mult=1.0)}))
