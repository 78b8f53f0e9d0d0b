# DINOv3 instead of DeiT: rotary positions and registers. Its weights have a licence of their own,
# the DINOv3 License.
_base_ = './segmenter_msvit-s_linear_8xb2-160k_ade20k-512x512.py'

checkpoint = (
    'https://huggingface.co/timm/vit_small_patch16_dinov3.lvd1689m/resolve/main/model.safetensors'
)
model = dict(
    backbone=dict(
        arch='dinov3-small',
        qkv_bias=False,  # as in these weights
        layer_scale=1e-5,
        init_cfg=dict(checkpoint=checkpoint),
    ),
)
