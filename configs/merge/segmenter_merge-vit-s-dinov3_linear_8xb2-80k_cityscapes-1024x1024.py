# DINOv3, whose weights have a licence of their own; its rotary positions are for any resolution.
_base_ = [
    '../_base_/mmtoken.py',
    '../_base_/common/segmenter-linear-80k_cityscapes-1024x1024.py',
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
        drop_path_rate=0.1,
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint),
    )
)
