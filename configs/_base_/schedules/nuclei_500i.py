# 500 iterations from scratch: minutes on two CPU cores.
_base_ = ['./coco_adamw_1x.py', 'mmdet::_base_/default_runtime.py']

train_cfg = dict(_delete_=True, type='IterBasedTrainLoop', max_iters=500, val_interval=500)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type='PolyLR', eta_min=0.0, power=1.0, begin=50, end=500, by_epoch=False),
]
optim_wrapper = dict(optimizer=dict(lr=1e-3), clip_grad=dict(max_norm=5.0))
default_hooks = dict(
    logger=dict(type='LoggerHook', interval=25),
    checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=50, max_keep_ckpts=1),
)
log_processor = dict(by_epoch=False)
auto_scale_lr = dict(base_batch_size=4)
