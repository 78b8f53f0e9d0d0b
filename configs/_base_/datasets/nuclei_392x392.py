# Enlarged, for a plain ViT: 14 regions of 28 pixels to a side.
# Batches are half as large.
_base_ = './nuclei_256x256.py'

scale = (392, 392)
train_pipeline = _base_.train_pipeline
test_pipeline = _base_.test_pipeline
train_pipeline[2].scale = scale
test_pipeline[1].scale = scale
train_dataloader = dict(batch_size=2, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
