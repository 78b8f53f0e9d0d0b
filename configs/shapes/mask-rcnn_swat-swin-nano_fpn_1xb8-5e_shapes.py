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
        type='mmtoken.SWATSwin',
        # Three stages, of 12, 6 and 3 planes: patch merging normalises over them
        arch=dict(embed_dims=48, depths=(2, 2, 2), num_heads=(2, 3, 6)),
        out_indices=(0, 1, 2),
        drop_path_rate=0.0,
    ),
    neck=dict(in_channels=[48, 96, 192]),
)
default_hooks = dict(logger=dict(interval=25), checkpoint=dict(max_keep_ckpts=1))
