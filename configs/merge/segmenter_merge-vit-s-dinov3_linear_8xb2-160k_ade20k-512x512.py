# DINOv3, whose weights have a licence of their own, and a linear classifier of its tokens, which
# are merged meanwhile.
_base_ = '../msvit/segmenter_msvit-s-dinov3_linear_8xb2-160k_ade20k-512x512.py'

custom_hooks = []  # there is no loss in the backbone
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmtoken.MergeViT',
        arch='dinov3-small',
        qkv_bias=False,  # as in these weights
        layer_scale=1e-5,
        drop_path_rate=0.1,
        init_cfg=dict(type='Pretrained', checkpoint=_base_.checkpoint),
    )
)
optim_wrapper = dict(
    paramwise_cfg=dict(
        custom_keys=dict(
            _delete_=True,
            cls_token=dict(decay_mult=0.0),
            reg_token=dict(decay_mult=0.0),
        )
    )
)
