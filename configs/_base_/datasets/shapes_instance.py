# The embedded data set (tools/datasets/make_shapes.py) as COCO instances. Scenes of 128 x 176 are
# enlarged by a quarter.
_base_ = 'mmdet::_base_/datasets/coco_instance.py'

data_root = 'data/shapes/coco/'
metainfo = dict(
    classes=('lamp', 'box', 'bottle', 'ball', 'fan', 'plate', 'clock', 'flag'),
    palette=[
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
scale = (220, 160)
train_pipeline = [
    dict(type='LoadImageFromFile', backend_args=None),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='Resize', scale=scale, keep_ratio=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile', backend_args=None),
    dict(type='Resize', scale=scale, keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(
        type='PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'),
    ),
]
train_dataloader = dict(
    batch_size=8, dataset=dict(data_root=data_root, metainfo=metainfo, pipeline=train_pipeline)
)
val_dataloader = dict(
    batch_size=8, dataset=dict(data_root=data_root, metainfo=metainfo, pipeline=test_pipeline)
)
test_dataloader = val_dataloader

val_evaluator = dict(ann_file=data_root + 'annotations/instances_val2017.json')
test_evaluator = val_evaluator
