# As for Swin, with the weight decay of ViTDet, which spares norms and positions.
_base_ = './coco_adamw_1x.py'

optim_wrapper = dict(
    optimizer=dict(weight_decay=0.1),
    paramwise_cfg=dict(norm_decay_mult=0.0, custom_keys={'pos_embed': dict(decay_mult=0.0)}),
)
