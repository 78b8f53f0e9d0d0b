# A plain ViT that merges tokens. It starts from DeiT; any weights of a plain ViT will do.
_base_ = [
    '../_base_/mmtoken.py',
    '../_base_/models/mask-rcnn_vit-s_sfp.py',
    'mmdet::_base_/datasets/coco_instance.py',
    '../_base_/schedules/coco_vit_1x.py',
    'mmdet::_base_/default_runtime.py',
]

model = dict(backbone=dict(type='mmtoken.MergeViT', cls_token=False))
