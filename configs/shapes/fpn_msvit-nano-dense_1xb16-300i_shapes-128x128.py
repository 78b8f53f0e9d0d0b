# The dense twin: ViT, trained on as long.
_base_ = './fpn_msvit-nano_1xb16-300i_shapes-128x128.py'

custom_hooks = []
model = dict(
    backbone=dict(gate=None, out_type='map'),
    neck=dict(
        _delete_=True,
        type='mmtoken.SimpleFeaturePyramid',
        in_channels=96,
        out_channels=64,
        num_outs=3,
        scales=(2.0, 1.0, 0.5),
        multi_level=True,
    ),
)
