# A quarter of the regions of a photograph of people is fine: 1050 tokens instead of 2400.
_base_ = [
    '../_base_/mmtoken.py',
    '../_base_/models/segmenter_msvit-s-dinov2_linear.py',
    '../_base_/datasets/ccp_840x560.py',
    '../_base_/schedules/linear_150i.py',
    'mmseg::_base_/default_runtime.py',
]

custom_hooks = [dict(type='mmtoken.TokenLossHook')]
model = dict(data_preprocessor=dict(size=(840, 560)), decode_head=dict(num_classes=13))
