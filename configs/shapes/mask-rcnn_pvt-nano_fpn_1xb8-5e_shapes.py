# PVT from scratch: what DGE and its dense twin start from. DGE of one granularity is PVT.
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
        type='mmtoken.DGEPVT',
        arch=dict(
            embed_dims=(32, 64, 128, 256),
            depths=(2, 2, 4, 2),
            num_heads=(1, 2, 4, 8),
            mlp_ratios=(4, 4, 4, 4),
            sr_ratios=(8, 4, 2, 1),
        ),
        granularities=(1,),
        pretrain_img_size=(160, 224),
        drop_path_rate=0.0,
    ),
)
default_hooks = dict(logger=dict(interval=25), checkpoint=dict(max_keep_ckpts=1))
