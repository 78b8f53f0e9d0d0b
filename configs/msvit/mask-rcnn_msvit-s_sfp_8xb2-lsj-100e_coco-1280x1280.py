# Windows of 16 x 16 patches, five to a side, in all but four blocks.
_base_ = './mask-rcnn_msvit-s_sfp_8xb2-lsj-100e_coco.py'

image_size = (1280, 1280)
model = dict(
    data_preprocessor=dict(
        batch_augments=[dict(type='BatchFixedSizePad', size=image_size, pad_mask=True)]
    ),
    backbone=dict(window_size=16),
)
train_pipeline, test_pipeline = _base_.train_pipeline, _base_.test_pipeline
train_pipeline[2].scale = train_pipeline[3].crop_size = test_pipeline[1].scale = image_size
train_dataloader = dict(dataset=dict(dataset=dict(pipeline=train_pipeline)))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
