# DINOv3, whose weights have a licence of their own, and a linear classifier of its tokens. Layer
# scale is folded into the layers before it.
_base_ = '../msvit/segmenter_msvit-s-dinov3_linear_8xb2-160k_ade20k-512x512.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmtoken.DGEDeiT',
        arch='dinov3-small',
        budget=dict(type='mmtoken.BudgetLoss', target=0.5, loss_weight=1.0),
        cls_token=True,
        qkv_bias=False,  # as in these weights
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
