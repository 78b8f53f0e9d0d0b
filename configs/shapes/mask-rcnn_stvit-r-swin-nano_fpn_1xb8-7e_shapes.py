_base_ = [
    '../_base_/mmtoken.py',
    '../_base_/models/shapes_mask-rcnn.py',
    '../_base_/datasets/shapes_instance.py',
    '../_base_/schedules/shapes_instance_7e.py',
    'mmdet::_base_/default_runtime.py',
]

default_hooks = dict(logger=dict(interval=25), checkpoint=dict(max_keep_ckpts=1))
