# MSViT from weights of DINOv3; 200 queries join its last three blocks. DINOv3's weights have a
# licence of their own, the DINOv3 License.
_base_ = '../msvit/mask2former_msvit-s_8xb2-lsj-50e_coco.py'

init_cfg = dict(
    type='Pretrained',
    checkpoint='https://huggingface.co/timm/vit_small_patch16_dinov3.lvd1689m/resolve/main/'
    'model.safetensors',
)
custom_imports = dict(imports=['mmtoken', 'mmtoken.heads.instance'], allow_failed_imports=False)
model = dict(
    backbone=dict(
        arch='dinov3-small',
        qkv_bias=False,  # as in these weights
        cls_token=True,
        layer_scale=1e-5,
        out_type='map',
        out_indices=(8,),
        out_prefix=True,
        init_cfg=init_cfg,
    ),
    neck=None,
    panoptic_head=dict(
        _delete_=True,
        type='mmtoken.EncoderOnlyInstanceHead',
        num_things_classes=80,
        num_stuff_classes=0,
        decoder=dict(
            arch='dinov3-small',
            num_blocks=3,
            num_queries=200,
            qkv_bias=False,
            layer_scale=1e-5,
            drop_path_rate=0.1,
            annealing=dict(total_iters=368750),
            init_cfg=init_cfg,
        ),
    ),
)
# Pretrained blocks of the head learn a tenth as fast as the rest, as those of the backbone do.
optim_wrapper = dict(
    paramwise_cfg=dict(custom_keys={'panoptic_head.decoder.blocks': dict(lr_mult=0.1)})
)
