# DGE from scratch. Nuclei are a few tokens wide, so regions are small.
_base_ = [
    '../_base_/mmtoken.py',
    '../_base_/models/nuclei_mask-rcnn.py',
    '../_base_/datasets/nuclei_256x256.py',
    '../_base_/schedules/nuclei_500i.py',
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
        granularities=(1, 2),
        region_size=2,
        budget=dict(type='mmtoken.BudgetLoss', target=0.48, loss_weight=10.0, warmup_iters=250),
        pretrain_img_size=256,
        drop_path_rate=0.0,
    ),
)
# As for the embedded data set: without these factors the deep stages alone would meet the budget.
optim_wrapper = dict(
    paramwise_cfg=dict(
        custom_keys={
            f'layers.{stage}.blocks.{block}.router': dict(lr_mult=factor)
            for stage, factor in enumerate((10.0, 3.0, 0.1, 0.03))
            for block in range(4)
        }
    ),
)
