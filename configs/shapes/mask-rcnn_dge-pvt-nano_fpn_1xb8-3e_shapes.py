# DGE from the weights of PVT. Objects are a few tokens wide here, so regions are small;
# labels teach which are fine.
_base_ = './mask-rcnn_pvt-nano_fpn_1xb8-5e_shapes.py'

load_from = 'work_dirs/mask-rcnn_pvt-nano_fpn_1xb8-5e_shapes/epoch_5.pth'
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
train_cfg = dict(max_epochs=3, val_interval=3)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=30),
    dict(type='PolyLR', eta_min=0.0, power=1.0, begin=30, end=225, by_epoch=False),
]
optim_wrapper = dict(optimizer=dict(lr=5e-4))
