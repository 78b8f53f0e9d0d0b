# A quarter of the regions of a photograph of a street is fine: 441 tokens instead of 1008.
_base_ = [
    '../_base_/mmtoken.py',
    '../_base_/models/segmenter_msvit-s-dinov2_linear.py',
    '../_base_/datasets/camvid_392x504.py',
    '../_base_/schedules/linear_150i.py',
    'mmseg::_base_/default_runtime.py',
]

custom_hooks = [dict(type='mmtoken.TokenLossHook')]
model = dict(data_preprocessor=dict(size=(392, 504)), decode_head=dict(num_classes=11))
