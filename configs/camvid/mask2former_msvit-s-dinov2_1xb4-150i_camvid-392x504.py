# Mask2Former behind the same MSViT, as deep as the time of the encoder-only head allows: one layer
# of the pixel decoder and two of the transformer decoder.
_base_ = './segmenter_msvit-s-dinov2_linear_1xb4-150i_camvid-392x504.py'

custom_imports = dict(imports=['mmtoken', 'mmdet.models'], allow_failed_imports=False)
attention = dict(embed_dims=128, num_heads=4, batch_first=True)
model = dict(
    backbone=dict(out_type='tokens'),
    neck=dict(type='mmtoken.MixedScaleNeck', in_channels=384, out_channels=128, num_outs=4),
    decode_head=dict(
        _delete_=True,
        type='Mask2FormerHead',
        in_channels=[128, 128, 128, 128],
        strides=[4, 8, 16, 32],
        feat_channels=128,
        out_channels=128,
        num_classes=11,
        num_queries=50,
        num_transformer_feat_level=3,
        align_corners=False,
        pixel_decoder=dict(
            type='mmdet.MSDeformAttnPixelDecoder',
            num_outs=3,
            norm_cfg=dict(type='GN', num_groups=32),
            act_cfg=dict(type='ReLU'),
            encoder=dict(
                num_layers=1,
                layer_cfg=dict(
                    self_attn_cfg=dict(num_levels=3, num_points=4, **attention),
                    ffn_cfg=dict(embed_dims=128, feedforward_channels=512),
                ),
            ),
            positional_encoding=dict(num_feats=64, normalize=True),
        ),
        enforce_decoder_input_project=False,
        positional_encoding=dict(num_feats=64, normalize=True),
        transformer_decoder=dict(
            return_intermediate=True,
            num_layers=2,
            layer_cfg=dict(
                self_attn_cfg=attention,
                cross_attn_cfg=attention,
                ffn_cfg=dict(embed_dims=128, feedforward_channels=1024),
            ),
        ),
        loss_cls=dict(
            type='mmdet.CrossEntropyLoss',
            use_sigmoid=False,
            loss_weight=2.0,
            class_weight=[1.0] * 11 + [0.1],
        ),
        loss_mask=dict(type='mmdet.CrossEntropyLoss', use_sigmoid=True, loss_weight=5.0),
        loss_dice=dict(
            type='mmdet.DiceLoss',
            use_sigmoid=True,
            activate=True,
            naive_dice=True,
            eps=1.0,
            loss_weight=5.0,
        ),
        train_cfg=dict(
            num_points=12544,
            oversample_ratio=3.0,
            importance_sample_ratio=0.75,
            assigner=dict(
                type='mmdet.HungarianAssigner',
                match_costs=[
                    dict(type='mmdet.ClassificationCost', weight=2.0),
                    dict(type='mmdet.CrossEntropyLossCost', weight=5.0, use_sigmoid=True),
                    dict(type='mmdet.DiceCost', weight=5.0, pred_act=True, eps=1.0),
                ],
            ),
            sampler=dict(type='mmdet.MaskPseudoSampler'),
        ),
    ),
)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={'neck': dict(lr_mult=10.0)}))
