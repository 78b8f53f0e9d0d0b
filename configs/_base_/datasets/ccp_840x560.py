# Clothing Co-Parsing (tools/datasets/ccp.py): whole photographs of nearly one size.
data_root = 'data/ccp'
metainfo = dict(
    classes=(
        'background',
        'skin',
        'hair',
        'top',
        'outerwear',
        'dress',
        'bottoms',
        'skirt',
        'legwear',
        'footwear',
        'bag',
        'headwear',
        'accessory',
    ),
    palette=[
        (0, 0, 0),
        (255, 205, 170),
        (120, 70, 20),
        (230, 25, 75),
        (60, 100, 200),
        (240, 50, 230),
        (0, 130, 200),
        (245, 130, 48),
        (170, 255, 195),
        (128, 0, 0),
        (255, 225, 25),
        (145, 30, 180),
        (60, 180, 75),
    ],
)
scale = (560, 840)  # width and height, whole regions of 28 pixels
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='Resize', scale=scale, keep_ratio=False),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackSegInputs'),
]
# Labels are loaded after resizing, so scores are of the photograph in its own size.
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=scale, keep_ratio=False),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
dataset = dict(
    type='BaseSegDataset',
    data_root=data_root,
    metainfo=metainfo,
    img_suffix='.jpg',
    seg_map_suffix='.png',
)
train_dataloader = dict(
    batch_size=2,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        **dataset,
        data_prefix=dict(img_path='images/train', seg_map_path='labels/train'),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        **dataset,
        data_prefix=dict(img_path='images/val', seg_map_path='labels/val'),
        pipeline=test_pipeline,
    ),
)
test_dataloader = dict(
    val_dataloader,
    dataset=dict(
        val_dataloader['dataset'],
        data_prefix=dict(img_path='images/test', seg_map_path='labels/test'),
    ),
)
val_evaluator = [
    dict(type='IoUMetric', iou_metrics=['mIoU']),
    dict(type='mmtoken.BoundaryIoUMetric', iou_metrics=['mIoU']),
]
test_evaluator = val_evaluator
