# Small sets of labeled photographs, as tools/datasets prepares them: whole photographs, resized to
# one size. A data set sets its folder, classes, sizes and batch.
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='Resize', scale=None, keep_ratio=False),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackSegInputs'),
]
# Labels are loaded after resizing, so scores are of the photograph in its own size.
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=None, keep_ratio=False),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
dataset = dict(type='BaseSegDataset', img_suffix='.jpg', seg_map_suffix='.png')
train_dataloader = dict(
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(**dataset, data_prefix=dict(img_path='images/train', seg_map_path='labels/train')),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(**dataset, data_prefix=dict(img_path='images/val', seg_map_path='labels/val')),
)
test_dataloader = dict(
    val_dataloader,
    dataset=dict(**dataset, data_prefix=dict(img_path='images/test', seg_map_path='labels/test')),
)
val_evaluator = [
    dict(type='IoUMetric', iou_metrics=['mIoU']),
    dict(type='mmtoken.BoundaryIoUMetric', iou_metrics=['mIoU']),
]
test_evaluator = val_evaluator
