# The encoder-only head from weights of DINOv2: queries join the last three blocks. Half of the
# regions is fine in the nine before. Training sees quarters of images, which makes an iteration six
# times as fast; testing sees whole images.
_base_ = [
    '../_base_/mmtoken.py',
    '../_base_/datasets/nuclei_392x392.py',
    '../_base_/schedules/nuclei_300i.py',
]

checkpoint = 'https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth'
init_cfg = dict(type='Pretrained', checkpoint=checkpoint)
custom_imports = dict(imports=['mmtoken', 'mmtoken.heads.instance'], allow_failed_imports=False)
custom_hooks = [dict(type='mmtoken.TokenLossHook')]
model = dict(
    type='Mask2Former',
    data_preprocessor=dict(
        type='DetDataPreprocessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_mask=True,
        pad_size_divisor=28,
        batch_augments=[dict(type='BatchFixedSizePad', size=(196, 196), pad_mask=True)],
    ),
    backbone=dict(
        type='mmtoken.MSViT',
        arch='small',
        coarse_size=28,
        fine_size=14,
        gate=dict(
            input='patches',
            fine_ratio=0.5,
            kernel_size=5,
            label_loss=dict(type='mmtoken.LabelPurityLoss'),
        ),
        train_mode='gathered',
        layer_scale=1e-5,
        img_size=518,  # as in the weights
        out_indices=(8,),
        out_prefix=True,
        frozen_stages=6,
        init_cfg=init_cfg,
    ),
    panoptic_head=dict(
        type='mmtoken.EncoderOnlyInstanceHead',
        num_things_classes=1,
        num_stuff_classes=0,
        decoder=dict(
            arch='small',
            num_blocks=3,
            num_queries=100,
            patch_size=14,
            layer_scale=1e-5,
            annealing=dict(total_iters=2000),
            init_cfg=init_cfg,
        ),
    ),
    panoptic_fusion_head=dict(
        type='MaskFormerFusionHead',
        num_things_classes=1,
        num_stuff_classes=0,
        loss_panoptic=None,
        init_cfg=None,
    ),
    train_cfg=dict(num_points=1024),
    test_cfg=dict(
        panoptic_on=False,
        semantic_on=False,
        instance_on=True,
        max_per_image=100,
        iou_thr=0.8,
        filter_low_score=True,
    ),
)
train_pipeline = _base_.train_pipeline
train_pipeline.insert(-1, dict(type='RandomCrop', crop_size=(196, 196)))
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
train_cfg = dict(max_iters=2000, val_interval=1000)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type='PolyLR', eta_min=0.0, power=1.0, begin=100, end=2000, by_epoch=False),
]
default_hooks = dict(checkpoint=dict(interval=500))
optim_wrapper = dict(
    paramwise_cfg=dict(
        custom_keys={
            'panoptic_head': dict(lr_mult=10.0),
            'panoptic_head.decoder.blocks': dict(lr_mult=1.0),
        }
    )
)
