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
        type='mmtoken.SWATSwin',
        # Three stages, of 12, 6 and 3 planes: patch merging normalises over them
        arch=dict(embed_dims=48, depths=(2, 2, 2), num_heads=(2, 3, 6)),
        out_indices=(0, 1, 2),
        drop_path_rate=0.0,
    ),
    neck=dict(in_channels=[48, 96, 192], num_outs=3),
    decode_head=dict(
        in_channels=[64, 64, 64], in_index=[0, 1, 2], feature_strides=[4, 8, 16], channels=64
    ),
)
