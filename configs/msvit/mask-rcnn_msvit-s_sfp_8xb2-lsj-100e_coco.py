# ViTDet's recipe: windows of 14 x 14 patches in all but four blocks, convolutional heads with
# norms, which are group norms here. Full precision; `--amp` turns on the half that ViTDet has.
_base_ = [
    '../_base_/mmtoken.py',
    '../_base_/models/mask-rcnn_vit-s_sfp.py',
    '../_base_/common/vitdet-lsj-100e_coco-instance.py',
]

norm_cfg = dict(type='GN', num_groups=32)
custom_hooks = [dict(type='mmtoken.TokenLossHook')]
model = dict(
    # After normalisation, with zeros, by which the backbone tells padding from image
    data_preprocessor=dict(
        batch_augments=[dict(type='BatchFixedSizePad', size=(1024, 1024), pad_mask=True)]
    ),
    backbone=dict(
        type='mmtoken.MSViT',
        gate=dict(
            loss=dict(type='mmtoken.BatchShapingLoss', target_coarse_ratio=0.5, warmup_iters=36000)
        ),
        train_mode='gathered',
        cls_token=False,
        window_size=14,
        out_type='tokens',
    ),
    neck=dict(type='mmtoken.MixedScaleNeck'),
    roi_head=dict(
        bbox_head=dict(type='Shared4Conv1FCBBoxHead', conv_out_channels=256, norm_cfg=norm_cfg),
        mask_head=dict(norm_cfg=norm_cfg),
    ),
)
optim_wrapper = dict(
    paramwise_cfg=dict(
        norm_decay_mult=0.0,
        custom_keys={
            'backbone.gate': dict(lr_mult=10.0),
            'backbone.gate_loss': dict(decay_mult=0.0),
            'pos_embed': dict(decay_mult=0.0),
        },
    )
)
