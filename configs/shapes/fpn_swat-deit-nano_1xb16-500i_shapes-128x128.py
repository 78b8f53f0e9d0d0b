# Strides 4, 8 and 16 from maps of stride 8: the finest unfolds the planes of the tokens.
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
        type='mmtoken.SWATDeiT',
        arch=dict(
            embed_dims=96,
            num_layers=6,
            num_heads=3,
            feedforward_channels=384,
            patch_size=8,
            mlp_kernel=5,
        ),
        plane_size=4,
        img_size=128,
        out_indices=(1, 3, 5),
    ),
    neck=dict(
        _delete_=True,
        type='mmtoken.SimpleFeaturePyramid',
        in_channels=96,
        out_channels=64,
        num_outs=3,
        scales=(2.0, 1.0, 0.5),
        multi_level=True,
        plane_size=4,
    ),
    decode_head=dict(
        in_channels=[64, 64, 64], in_index=[0, 1, 2], feature_strides=[4, 8, 16], channels=64
    ),
)
