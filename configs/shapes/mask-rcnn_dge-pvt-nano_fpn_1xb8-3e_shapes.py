# DGE from the weights of PVT. Objects are a few tokens wide here, so regions are small.
_base_ = './mask-rcnn_pvt-nano_fpn_1xb8-5e_shapes.py'

load_from = 'work_dirs/mask-rcnn_pvt-nano_fpn_1xb8-5e_shapes/epoch_5.pth'
custom_hooks = [dict(type='mmtoken.TokenLossHook')]
model = dict(
    backbone=dict(
        granularities=(1, 2),
        region_size=2,
        budget=dict(type='mmtoken.BudgetLoss', target=0.48, loss_weight=10.0, warmup_iters=110),
    )
)
train_cfg = dict(max_epochs=3, val_interval=3)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=30),
    dict(type='PolyLR', eta_min=0.0, power=1.0, begin=30, end=225, by_epoch=False),
]
# All weights move at one speed under AdamW, so a router's scores move the faster the more channels
# it sees. Without these factors the deep stages alone would meet the budget, at once.
optim_wrapper = dict(
    optimizer=dict(lr=5e-4),
    paramwise_cfg=dict(
        custom_keys={
            f'layers.{stage}.blocks.{block}.router': dict(lr_mult=factor)
            for stage, factor in enumerate((10.0, 3.0, 0.1, 0.03))
            for block in range(4)
        }
    ),
)
