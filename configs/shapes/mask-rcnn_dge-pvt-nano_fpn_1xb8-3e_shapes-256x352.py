# Scenes of 256 x 352 pixels (make_shapes.py --size 256 352), from the PVT trained on small ones.
# Masks teach one router a stage. In deep stages few regions have one label, so they keep more
# queries.
_base_ = './mask-rcnn_dge-pvt-nano_fpn_1xb8-3e_shapes.py'

model = dict(
    backbone=dict(
        budget=None,
        router=dict(
            query_ratio=(0.44, 0.44, 0.5, 0.6),
            kernel_size=3,
            label_loss=dict(type='mmtoken.LabelPurityLoss'),
        ),
    )
)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=dict(router=dict(lr_mult=2.0))))

train_pipeline, test_pipeline = _base_.train_pipeline, _base_.test_pipeline
train_pipeline[2].scale = test_pipeline[1].scale = (352, 256)  # as drawn
data_root = 'data/shapes-256x352/coco/'
train_dataloader = dict(dataset=dict(data_root=data_root, pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(data_root=data_root, pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'annotations/instances_val2017.json')
test_evaluator = val_evaluator
