# 750 iterations from scratch: minutes on two CPU cores.
_base_ = './ade20k_adamw_160k.py'

train_cfg = dict(max_iters=750, val_interval=750)
optim_wrapper = dict(optimizer=dict(lr=1e-3, weight_decay=0.05), clip_grad=dict(max_norm=5.0))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=75),
    dict(type='PolyLR', eta_min=0.0, power=1.0, begin=75, end=750, by_epoch=False),
]
default_hooks = dict(logger=dict(interval=25), checkpoint=dict(interval=750))
