# The backbone of mask-rcnn_stvit-r-swin-nano_fpn_1xb4-500i_nuclei-256x256 with a light head, which
# finds boxes from stride 8 on.
_base_ = [
    '../_base_/mmtoken.py',
    '../_base_/models/nuclei_atss-light.py',
    '../_base_/datasets/nuclei_256x256.py',
    '../_base_/schedules/nuclei_500i.py',
]

model = dict(
    backbone=dict(
        type='mmtoken.STViTRSwin',
        arch=dict(embed_dims=32, depths=(2, 2, 12, 2), num_heads=(1, 2, 4, 8)),
        window_size=8,
        key_sizes=(16, 24, 15),
        pad_mask='exact',
        drop_path_rate=0.0,
        out_indices=(1, 2, 3),
    ),
    neck=dict(in_channels=[64, 128, 256], start_level=0),
)
val_evaluator = dict(metric='bbox')
test_evaluator = val_evaluator
