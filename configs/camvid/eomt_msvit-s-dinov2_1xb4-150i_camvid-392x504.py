# The encoder-only head: queries join the last three blocks. A quarter of the regions is fine in the
# nine before.
_base_ = './segmenter_msvit-s-dinov2_linear_1xb4-150i_camvid-392x504.py'

custom_imports = dict(imports=['mmtoken', 'mmtoken.heads.semantic'], allow_failed_imports=False)
model = dict(
    backbone=dict(out_indices=(8,), out_prefix=True),
    decode_head=dict(
        _delete_=True,
        type='mmtoken.EncoderOnlySemanticHead',
        num_classes=11,
        decoder=dict(
            arch='small',
            num_blocks=3,
            num_queries=50,
            patch_size=14,
            layer_scale=1e-5,
            annealing=dict(total_iters=150),
            init_cfg=_base_.model.backbone.init_cfg,
        ),
    ),
)
optim_wrapper = dict(
    paramwise_cfg=dict(custom_keys={'decode_head.decoder.blocks': dict(lr_mult=1.0)})
)
