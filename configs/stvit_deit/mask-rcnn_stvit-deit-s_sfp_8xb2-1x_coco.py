# The recovery runs in the backbone. It starts from DeiT: no weights of STViT on plain ViT were
# released.
_base_ = [
    '../_base_/mmtoken.py',
    '../_base_/models/mask-rcnn_vit-s_sfp.py',
    'mmdet::_base_/datasets/coco_instance.py',
    '../_base_/schedules/coco_vit_1x.py',
    'mmdet::_base_/default_runtime.py',
]

model = dict(backbone=dict(type='mmtoken.STViTDeiT'))
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={'centers': dict(decay_mult=0.0)}))
