# Clothing Co-Parsing (tools/datasets/ccp.py): whole photographs of nearly one size.
_base_ = './photographs.py'

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
train_pipeline, test_pipeline = _base_.train_pipeline, _base_.test_pipeline
train_pipeline[2].scale = test_pipeline[1].scale = scale
dataset = dict(data_root=data_root, metainfo=metainfo)
train_dataloader = dict(batch_size=2, dataset=dict(**dataset, pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(**dataset, pipeline=test_pipeline))
test_dataloader = val_dataloader
auto_scale_lr = dict(enable=False, base_batch_size=2)
