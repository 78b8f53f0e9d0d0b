# In testing images are resized to a multiple of 32, as with PVT.
_base_ = [
    '../_base_/mmtoken.py',
    '../_base_/models/fpn_dge-pvt-t.py',
    'mmseg::_base_/datasets/ade20k.py',
    '../_base_/schedules/ade20k_pvt_40k.py',
    'mmseg::_base_/default_runtime.py',
]

custom_hooks = [dict(type='mmtoken.TokenLossHook')]
model = dict(data_preprocessor=dict(size=(512, 512)), decode_head=dict(num_classes=150))
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(2048, 512), keep_ratio=True),
    dict(type='ResizeToMultiple', size_divisor=32),
    dict(type='LoadAnnotations', reduce_zero_label=True),
    dict(type='PackSegInputs'),
]
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
