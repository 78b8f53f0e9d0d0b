# MSViT from weights of DINOv2 with a linear head, for whole photographs. A quarter of the regions
# is fine; labels teach the gate which. The last four blocks are trained. Configs set the size of
# the photographs and the number of classes.
checkpoint = 'https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth'
model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(
        type='SegDataPreProcessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=255,
    ),
    backbone=dict(
        type='mmtoken.MSViT',
        arch='small',
        coarse_size=28,
        fine_size=14,
        gate=dict(
            input='patches',
            fine_ratio=0.25,
            kernel_size=5,
            label_loss=dict(type='mmtoken.LabelPurityLoss'),
        ),
        train_mode='gathered',
        layer_scale=1e-5,
        img_size=518,  # as in the weights
        frozen_stages=8,
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint),
    ),
    decode_head=dict(
        type='FCNHead',
        in_channels=384,
        channels=384,
        num_convs=0,
        concat_input=False,
        dropout_ratio=0.0,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
    ),
    test_cfg=dict(mode='whole'),
)
