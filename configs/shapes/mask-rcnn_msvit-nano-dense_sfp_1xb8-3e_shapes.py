# The dense twin: ViT, trained on as long.
_base_ = './mask-rcnn_msvit-nano_sfp_1xb8-3e_shapes.py'

custom_hooks = []
model = dict(
    backbone=dict(gate=None, out_type='map'),
    neck=dict(
        _delete_=True,
        type='mmtoken.SimpleFeaturePyramid',
        in_channels=96,
        out_channels=64,
        num_outs=5,
        scales=(2.0, 1.0, 0.5),
    ),
)
