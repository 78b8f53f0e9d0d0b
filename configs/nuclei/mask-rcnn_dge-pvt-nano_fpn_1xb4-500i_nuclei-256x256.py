# DGE from scratch. Nuclei are a few tokens wide, so regions are small; masks teach which are fine.
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
        router=dict(
            query_ratio=0.44,
            kernel_size=3,
            label_loss=dict(type='mmtoken.LabelPurityLoss'),
        ),
        pretrain_img_size=256,
        drop_path_rate=0.0,
    ),
)
