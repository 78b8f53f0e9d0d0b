# Behind four blocks, four tokens become a semantic token. The layers that make semantic tokens and
# recover the map are new, so that more is trained than in the twin: all behind the fourth block.
_base_ = './segmenter_msvit-s-dinov2-dense_linear_1xb2-150i_ccp-840x560.py'

checkpoint = 'https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth'
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmtoken.STViTDeiT',
        arch='small',
        semantic_size=2,
        base_layers=4,
        patch_size=14,
        img_size=518,  # as in the weights
        frozen_stages=4,
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint),
    )
)
