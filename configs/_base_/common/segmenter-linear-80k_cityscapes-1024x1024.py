# A plain backbone with a linear decoder on Cityscapes. Crops have 1024 x 1024 pixels in training;
# in testing they slide over frames of 1024 x 2048, as with mmseg's SegFormer. A config names the
# backbone.
_base_ = [
    '../models/segmenter_vit-s_linear.py',
    'mmseg::_base_/datasets/cityscapes_1024x1024.py',
    '../schedules/cityscapes_vit_80k.py',
    'mmseg::_base_/default_runtime.py',
]

model = dict(
    data_preprocessor=dict(size=(1024, 1024)),
    decode_head=dict(num_classes=19),
    test_cfg=dict(mode='slide', crop_size=(1024, 1024), stride=(768, 768)),
)
