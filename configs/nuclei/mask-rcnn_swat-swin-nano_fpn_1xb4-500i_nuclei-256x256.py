_base_ = [
    '../_base_/mmtoken.py',
    '../_base_/models/nuclei_mask-rcnn.py',
    '../_base_/datasets/nuclei_256x256.py',
    '../_base_/schedules/nuclei_500i.py',
]

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmtoken.SWATSwin',
        # Three stages, of 12, 6 and 3 planes: patch merging normalizes over them
        arch=dict(embed_dims=48, depths=(2, 2, 2), num_heads=(2, 3, 6)),
        window_size=8,
        out_indices=(0, 1, 2),
        drop_path_rate=0.0,
    ),
    neck=dict(in_channels=[48, 96, 192]),
)
