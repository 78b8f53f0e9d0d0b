_base_ = [
    '../_base_/mmtoken.py',
    '../_base_/models/shapes_semantic-fpn.py',
    '../_base_/datasets/shapes_semantic.py',
    '../_base_/schedules/shapes_semantic_500i.py',
    'mmseg::_base_/default_runtime.py',
]

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmtoken.PSViT',
        # Strides 4, 8 and 16
        arch=dict(stages=[(48, 2, (2,)), (96, 3, (2, 2)), (192, 6, (2,))]),
        patch_size=4,
        window_sizes=(8, None, None),
        img_size=128,
    ),
    neck=dict(in_channels=[48, 96, 192], num_outs=3),
    decode_head=dict(
        in_channels=[64, 64, 64], in_index=[0, 1, 2], feature_strides=[4, 8, 16], channels=64
    ),
)
