# DGE from the weights of PVT. Objects are a few tokens wide here, so regions are small;
# labels teach which are fine.
_base_ = './fpn_pvt-nano_1xb16-500i_shapes-128x128.py'

load_from = 'work_dirs/fpn_pvt-nano_1xb16-500i_shapes-128x128/iter_500.pth'
custom_hooks = [dict(type='mmtoken.TokenLossHook')]
model = dict(
    backbone=dict(
        granularities=(1, 2),
        region_size=2,
        router=dict(
            query_ratio=0.44,
            kernel_size=3,
            label_loss=dict(type='mmtoken.LabelPurityLoss'),
        ),
    )
)
train_cfg = dict(max_iters=300, val_interval=300)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=30),
    dict(type='PolyLR', eta_min=0.0, power=1.0, begin=30, end=300, by_epoch=False),
]
default_hooks = dict(checkpoint=dict(interval=300))
optim_wrapper = dict(optimizer=dict(lr=5e-4))
