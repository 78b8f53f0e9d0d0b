# 500 iterations, for comparisons of several seeds.
_base_ = './shapes_semantic_750i.py'

train_cfg = dict(max_iters=500, val_interval=500)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=75),
    dict(type='PolyLR', eta_min=0.0, power=1.0, begin=75, end=500, by_epoch=False),
]
default_hooks = dict(checkpoint=dict(interval=500))
