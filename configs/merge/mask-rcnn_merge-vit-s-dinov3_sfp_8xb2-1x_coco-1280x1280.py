# DINOv3, whose weights have a licence of their own; its rotary positions are for any resolution.
_base_ = [
    '../_base_/mmtoken.py',
    '../_base_/models/mask-rcnn_vit-s_sfp.py',
    '../_base_/datasets/coco_instance_1280x1280.py',
    '../_base_/schedules/coco_vit_1x.py',
    'mmdet::_base_/default_runtime.py',
]

checkpoint = (
    'https://huggingface.co/timm/vit_small_patch16_dinov3.lvd1689m/resolve/main/model.safetensors'
)
model = dict(
    backbone=dict(
        type='mmtoken.MergeViT',
        arch='dinov3-small',
        qkv_bias=False,  # as in these weights
        layer_scale=1e-5,
        init_cfg=dict(checkpoint=checkpoint),
    )
)
