# Five epochs, for comparisons of several seeds.
_base_ = './shapes_instance_7e.py'

train_cfg = dict(max_epochs=5, val_interval=5)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=75),
    dict(
        type='CosineAnnealingLR',
        by_epoch=True,
        begin=1,
        end=5,
        eta_min=1e-5,
        convert_to_iter_based=True,
    ),
]
