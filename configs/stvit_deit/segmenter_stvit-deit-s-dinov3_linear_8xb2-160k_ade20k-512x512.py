# DINOv3 instead of DeiT: rotary positions, a class token and registers, which stay beside the
# semantic tokens; and a linear classifier of the recovered tokens. Its weights have a licence of
# their own, the DINOv3 License.
_base_ = './segmenter_stvit-deit-s_mask_8xb2-160k_ade20k-512x512.py'

checkpoint = (
    'https://huggingface.co/timm/vit_small_patch16_dinov3.lvd1689m/resolve/main/model.safetensors'
)
model = dict(
    backbone=dict(
        arch='dinov3-small',
        cls_token=True,
        qkv_bias=False,  # as in these weights
        layer_scale=1e-5,
        init_cfg=dict(checkpoint=checkpoint),
    ),
    decode_head=dict(
        _delete_=True,
        type='FCNHead',
        in_channels=384,
        channels=384,
        num_convs=0,
        concat_input=False,
        dropout_ratio=0.0,
        num_classes=150,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
    ),
)
optim_wrapper = dict(
    paramwise_cfg=dict(
        custom_keys=dict(
            _delete_=True,
            centers=dict(decay_mult=0.0),
            cls_token=dict(decay_mult=0.0),
            reg_token=dict(decay_mult=0.0),
        )
    )
)
