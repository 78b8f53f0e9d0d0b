# Tokens that are alike merge before the third and the sixth block.
_base_ = './segmenter_msvit-s-dinov2-dense_linear_1xb2-150i_ccp-840x560.py'

checkpoint = 'https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth'
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmtoken.MergeViT',
        arch='small',
        merge_blocks=(2, 5),
        patch_size=14,
        cls_token=True,
        layer_scale=1e-5,
        img_size=518,  # as in the weights
        frozen_stages=8,
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint),
    )
)
