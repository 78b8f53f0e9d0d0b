_base_ = [
    '../_base_/mmtoken.py',
    '../_base_/models/shapes_mask-rcnn.py',
    '../_base_/datasets/shapes_instance.py',
    '../_base_/schedules/shapes_instance_5e.py',
    'mmdet::_base_/default_runtime.py',
]

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmtoken.PSViT',
        # Strides 4, 8 and 16
        arch=dict(stages=[(48, 2, (2,)), (96, 3, (2, 2)), (192, 6, (2,))]),
        patch_size=4,
        window_sizes=(8, None, None),
        img_size=(160, 224),
    ),
    neck=dict(in_channels=[48, 96, 192]),
)
default_hooks = dict(logger=dict(interval=25), checkpoint=dict(max_keep_ckpts=1))
