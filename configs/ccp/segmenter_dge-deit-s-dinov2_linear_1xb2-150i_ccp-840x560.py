# Half of the queries on each photograph; labels teach the router where.
_base_ = './segmenter_msvit-s-dinov2-dense_linear_1xb2-150i_ccp-840x560.py'

checkpoint = 'https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth'
custom_hooks = [dict(type='mmtoken.TokenLossHook')]
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmtoken.DGEDeiT',
        arch='small',
        granularities=(1, 2, 4),
        region_size=4,
        router=dict(
            query_ratio=0.5,
            kernel_size=3,
            label_loss=dict(type='mmtoken.LabelPurityLoss'),
        ),
        patch_size=14,
        cls_token=True,
        img_size=518,  # as in the weights
        frozen_stages=8,
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint),
    )
)
