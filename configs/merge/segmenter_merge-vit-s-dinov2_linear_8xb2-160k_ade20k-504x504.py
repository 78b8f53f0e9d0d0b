# DINOv2 with registers, and a linear classifier of its tokens, which are merged meanwhile.
_base_ = '../msvit/segmenter_msvit-s-dinov2_linear_8xb2-160k_ade20k-504x504.py'

custom_hooks = []  # there is no loss in the backbone
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmtoken.MergeViT',
        arch='small',
        patch_size=14,
        num_registers=4,
        layer_scale=1e-5,
        img_size=518,  # as in the weights
        drop_path_rate=0.1,
        init_cfg=dict(type='Pretrained', checkpoint=_base_.checkpoint),
    )
)
optim_wrapper = dict(
    paramwise_cfg=dict(
        custom_keys=dict(
            _delete_=True,
            pos_embed=dict(decay_mult=0.0),
            cls_token=dict(decay_mult=0.0),
            reg_token=dict(decay_mult=0.0),
        )
    )
)
