_base_ = [
    '../_base_/mmtoken.py',
    '../_base_/models/nuclei_mask-rcnn.py',
    '../_base_/datasets/nuclei_256x256.py',
    '../_base_/schedules/nuclei_500i.py',
]

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmtoken.PSViT',
        # Strides 4, 8 and 16
        arch=dict(stages=[(48, 2, (2,)), (96, 3, (2, 2)), (192, 6, (2,))]),
        patch_size=4,
        window_sizes=(8, None, None),
        img_size=256,
    ),
    neck=dict(in_channels=[48, 96, 192]),
)
