# Scenes of 256 x 352 pixels (make_shapes.py --size 256 352). Windows of 8 tokens need little
# padding here, and the third stage has two units. It is 2 x 3 windows of 8, or 3 x 3 semantic,
# tokens: all are in a patch of 15.
_base_ = './mask-rcnn_stvit-r-swin-nano_fpn_1xb8-7e_shapes.py'

model = dict(backbone=dict(arch=dict(depths=(2, 2, 12, 2)), window_size=8, key_sizes=(16, 24, 15)))
train_pipeline, test_pipeline = _base_.train_pipeline, _base_.test_pipeline
train_pipeline[2].scale = test_pipeline[1].scale = (352, 256)  # as drawn
data_root = 'data/shapes-256x352/coco/'
train_dataloader = dict(dataset=dict(data_root=data_root, pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(data_root=data_root, pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'annotations/instances_val2017.json')
test_evaluator = val_evaluator
