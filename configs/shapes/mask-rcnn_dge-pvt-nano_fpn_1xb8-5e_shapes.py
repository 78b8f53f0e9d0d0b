_base_ = [
    '../_base_/mmtoken.py',
    '../_base_/models/shapes_mask-rcnn.py',
    '../_base_/datasets/shapes_instance.py',
    '../_base_/schedules/shapes_instance_5e.py',
    'mmdet::_base_/default_runtime.py',
]

custom_hooks = [dict(type='mmtoken.TokenLossHook')]
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmtoken.DGEPVT',
        arch=dict(
            embed_dims=(32, 64, 128, 256),
            depths=(2, 2, 4, 2),
            num_heads=(1, 2, 4, 8),
            mlp_ratios=(4, 4, 4, 4),
            sr_ratios=(8, 4, 2, 1),
        ),
        budget=dict(type='mmtoken.BudgetLoss', target=0.45, loss_weight=10.0),
        pretrain_img_size=(160, 224),
        drop_path_rate=0.0,
    ),
)
default_hooks = dict(logger=dict(interval=25), checkpoint=dict(max_keep_ckpts=1))
# All weights move at one speed under AdamW, so a router's scores move the faster the more channels
# it sees. Without these factors the deep stages alone would meet the budget, at once.
optim_wrapper = dict(
    paramwise_cfg=dict(
        custom_keys={
            f'layers.{stage}.blocks.{block}.router': dict(lr_mult=factor)
            for stage, factor in enumerate((3.0, 1.0, 0.1, 0.03))
            for block in range(4)
        }
    )
)
