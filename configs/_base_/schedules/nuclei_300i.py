# 300 iterations of two images from weights of a ViT, which learn slowly; what is new learns faster.
_base_ = './nuclei_500i.py'

train_cfg = dict(max_iters=300, val_interval=300)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=30),
    dict(type='PolyLR', eta_min=0.0, power=1.0, begin=30, end=300, by_epoch=False),
]
optim_wrapper = dict(
    optimizer=dict(lr=1e-4),
    paramwise_cfg=dict(custom_keys={'backbone.gate': dict(lr_mult=100.0)}),
)
auto_scale_lr = dict(base_batch_size=2)
