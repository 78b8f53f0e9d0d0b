# The embedded data set (tools/datasets/make_shapes.py) in ADE20K's layout, with ADE20K's ids.
_base_ = 'mmseg::_base_/datasets/ade20k.py'

data_root = 'data/shapes/ade/ADEChallengeData2016'
metainfo = dict(
    classes=('wall', 'lamp', 'box', 'bottle', 'ball', 'fan', 'plate', 'clock', 'flag'),
    palette=[
        (120, 120, 120),
        (224, 255, 8),
        (0, 255, 20),
        (0, 61, 255),
        (0, 255, 112),
        (0, 173, 255),
        (133, 255, 0),
        (255, 163, 0),
        (255, 0, 133),
    ],
)
crop_size = (128, 128)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', reduce_zero_label=True),
    dict(type='RandomResize', scale=(176, 128), ratio_range=(1.0, 1.5), keep_ratio=True),
    dict(type='RandomCrop', crop_size=crop_size, cat_max_ratio=0.9),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(220, 160), keep_ratio=True),
    dict(type='LoadAnnotations', reduce_zero_label=True),
    dict(type='PackSegInputs'),
]
train_dataloader = dict(
    batch_size=16,
    num_workers=2,
    dataset=dict(data_root=data_root, metainfo=metainfo, pipeline=train_pipeline),
)
val_dataloader = dict(
    num_workers=2, dataset=dict(data_root=data_root, metainfo=metainfo, pipeline=test_pipeline)
)
test_dataloader = val_dataloader
