# No weights of PSViT were released, and no others fit: set model.backbone.init_cfg to your own.
_base_ = [
    '../_base_/mmtoken.py',
    'mmseg::_base_/models/fpn_r50.py',
    'mmseg::_base_/datasets/ade20k.py',
    '../_base_/schedules/ade20k_pvt_40k.py',
    'mmseg::_base_/default_runtime.py',
]

model = dict(
    data_preprocessor=dict(size=(512, 512)),
    pretrained=None,
    backbone=dict(
        _delete_=True, type='mmtoken.PSViT', arch='tiny', finest_map=True, drop_path_rate=0.1
    ),
    neck=dict(in_channels=[96, 96, 192, 384]),
    decode_head=dict(num_classes=150),
)
