# Nuclei of the Data Science Bowl 2018 (tools/datasets/nuclei.py). Half of the images have 256 x 256
# pixels; the others are resized to that, whatever their proportions.
_base_ = 'mmdet::_base_/datasets/coco_instance.py'

data_root = 'data/nuclei/'
metainfo = dict(classes=('nucleus',), palette=[(224, 255, 8)])
scale = (256, 256)
train_pipeline = [
    dict(type='LoadImageFromFile', backend_args=None),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='Resize', scale=scale, keep_ratio=False),
    dict(
        type='RandomFlip', prob=[0.25, 0.25, 0.25], direction=['horizontal', 'vertical', 'diagonal']
    ),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile', backend_args=None),
    dict(type='Resize', scale=scale, keep_ratio=False),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(
        type='PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'),
    ),
]
dataset = dict(data_root=data_root, metainfo=metainfo)
train_dataloader = dict(
    batch_size=4,
    sampler=dict(_delete_=True, type='InfiniteSampler', shuffle=True),
    batch_sampler=None,
    dataset=dict(
        **dataset,
        ann_file='train.json',
        data_prefix=dict(img='train/'),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    dataset=dict(
        **dataset, ann_file='val.json', data_prefix=dict(img='val/'), pipeline=test_pipeline
    )
)
test_dataloader = val_dataloader

# mAP counts the 100 surest detections of an image, as COCO does; an image in nine has more nuclei.
# mAP_50, mAP_75 and, of masks, nucleus_precision, the AP by class, count all.
val_evaluator = dict(ann_file=data_root + 'val.json', classwise=True)
test_evaluator = val_evaluator
