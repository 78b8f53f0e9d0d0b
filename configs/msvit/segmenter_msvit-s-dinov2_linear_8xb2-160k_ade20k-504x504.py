# DINOv2 with registers instead of DeiT: patches of 14 pixels, regions of 28, of which a crop of 504
# has 18 a side. Images are resized to that.
_base_ = './segmenter_msvit-s_linear_8xb2-160k_ade20k-512x512.py'

checkpoint = 'https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14/dinov2_vits14_reg4_pretrain.pth'
crop_size = (504, 504)
model = dict(
    data_preprocessor=dict(size=crop_size),
    backbone=dict(
        coarse_size=28,
        fine_size=14,
        num_registers=4,
        layer_scale=1e-5,
        img_size=518,  # as in the weights
        init_cfg=dict(checkpoint=checkpoint),
    ),
    test_cfg=dict(crop_size=crop_size, stride=(476, 476)),
)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', reduce_zero_label=True),
    dict(type='RandomResize', scale=(2016, 504), ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type='RandomCrop', crop_size=crop_size, cat_max_ratio=0.75),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(2016, 504), keep_ratio=True),
    dict(type='LoadAnnotations', reduce_zero_label=True),
    dict(type='PackSegInputs'),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
