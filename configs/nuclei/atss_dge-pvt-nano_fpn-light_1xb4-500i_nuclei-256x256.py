# The backbone of mask-rcnn_dge-pvt-nano_fpn_1xb4-500i_nuclei-256x256 with a light head, which finds
# boxes from stride 8 on. Masks teach the routers all the same.
_base_ = [
    '../_base_/mmtoken.py',
    '../_base_/models/nuclei_atss-light.py',
    '../_base_/datasets/nuclei_256x256.py',
    '../_base_/schedules/nuclei_500i.py',
]

custom_hooks = [dict(type='mmtoken.TokenLossHook')]
model = dict(
    backbone=dict(
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
        out_indices=(1, 2, 3),
    ),
    neck=dict(in_channels=[64, 128, 256], start_level=0),
)
val_evaluator = dict(metric='bbox')
test_evaluator = val_evaluator
