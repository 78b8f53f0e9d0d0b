# DGE from the weights of PVT. Objects are a few tokens wide here, so regions are small.
_base_ = './fpn_pvt-nano_1xb16-500i_shapes-128x128.py'

load_from = 'work_dirs/fpn_pvt-nano_1xb16-500i_shapes-128x128/iter_500.pth'
custom_hooks = [dict(type='mmtoken.TokenLossHook')]
model = dict(
    backbone=dict(
        granularities=(1, 2),
        region_size=2,
        budget=dict(type='mmtoken.BudgetLoss', target=0.66, loss_weight=10.0, warmup_iters=150),
    )
)
train_cfg = dict(max_iters=300, val_interval=300)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=30),
    dict(type='PolyLR', eta_min=0.0, power=1.0, begin=30, end=300, by_epoch=False),
]
default_hooks = dict(checkpoint=dict(interval=300))
# All weights move at one speed under AdamW, so a router's scores move the faster the more channels
# it sees. Without these factors the deep stages alone would meet the budget, at once.
optim_wrapper = dict(
    optimizer=dict(lr=5e-4),
    paramwise_cfg=dict(
        custom_keys={
            f'layers.{stage}.blocks.{block}.router': dict(lr_mult=factor)
            for stage, factor in enumerate((3.0, 1.0, 0.2, 0.07))
            for block in range(4)
        }
    ),
)
