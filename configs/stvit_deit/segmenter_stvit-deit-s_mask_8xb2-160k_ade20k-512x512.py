# Segmenter's mask transformer on the map of the last block. AdamW instead of Segmenter's SGD: the
# layers that make semantic tokens are new to the weights.
_base_ = [
    '../_base_/mmtoken.py',
    'mmseg::_base_/models/segmenter_vit-b16_mask.py',
    'mmseg::_base_/datasets/ade20k.py',
    '../_base_/schedules/ade20k_adamw_160k.py',
    'mmseg::_base_/default_runtime.py',
]

# DeiT's ImageNet-1k weights: none of STViT on plain ViT were released.
checkpoint = 'https://dl.fbaipublicfiles.com/deit/deit_small_patch16_224-cd65a155.pth'
model = dict(
    data_preprocessor=dict(
        size=(512, 512), mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375]
    ),
    pretrained=None,
    backbone=dict(
        _delete_=True,
        type='mmtoken.STViTDeiT',
        arch='small',
        drop_path_rate=0.1,
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint),
    ),
    decode_head=dict(in_channels=384, channels=384, embed_dims=384, num_heads=6),
)
train_dataloader = dict(batch_size=2)
optim_wrapper = dict(
    paramwise_cfg=dict(
        norm_decay_mult=0.0,
        custom_keys={
            'pos_embed': dict(decay_mult=0.0),
            'centers': dict(decay_mult=0.0),
            'cls_emb': dict(decay_mult=0.0),
        },
    )
)
