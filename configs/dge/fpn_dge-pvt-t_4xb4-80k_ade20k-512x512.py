# On 4 GPUs: half the learning rate and twice the iterations of 8, as PVT's configs say.
_base_ = './fpn_dge-pvt-t_8xb4-40k_ade20k-512x512.py'

train_cfg = dict(max_iters=80000, val_interval=8000)
optim_wrapper = dict(optimizer=dict(lr=1e-4))
param_scheduler = [
    dict(type='PolyLR', eta_min=0.0, power=0.9, begin=0, end=80000, by_epoch=False),
]
default_hooks = dict(checkpoint=dict(interval=8000))
auto_scale_lr = dict(base_batch_size=16)
