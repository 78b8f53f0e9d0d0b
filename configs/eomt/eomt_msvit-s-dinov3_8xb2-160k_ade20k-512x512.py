# MSViT from weights of DINOv3; 100 queries join its last three blocks. DINOv3's weights have a
# licence of their own, the DINOv3 License.
_base_ = '../msvit/segmenter_msvit-s-dinov3_linear_8xb2-160k_ade20k-512x512.py'

custom_imports = dict(imports=['mmtoken', 'mmtoken.heads.semantic'], allow_failed_imports=False)
model = dict(
    backbone=dict(
        gate=dict(
            _delete_=True,
            input='patches',
            fine_ratio=0.25,
            kernel_size=5,
            label_loss=dict(type='mmtoken.LabelPurityLoss'),
        ),
        train_mode='gathered',
        out_indices=(8,),
        out_prefix=True,
    ),
    decode_head=dict(
        _delete_=True,
        type='mmtoken.EncoderOnlySemanticHead',
        num_classes=150,
        decoder=dict(
            arch='dinov3-small',
            num_blocks=3,
            num_queries=100,
            qkv_bias=False,
            layer_scale=1e-5,
            annealing=dict(total_iters=160000),
            init_cfg=dict(type='Pretrained', checkpoint=_base_.model.backbone.init_cfg.checkpoint),
        ),
    ),
)
