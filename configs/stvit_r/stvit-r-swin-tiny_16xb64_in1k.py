# ImageNet-1k by the released recipe; for `train.py` of mmpretrain. Tiny has Swin's drop path.
_base_ = [
    '../_base_/mmtoken.py',
    'mmpretrain::_base_/models/swin_transformer/tiny_224.py',
    'mmpretrain::_base_/datasets/imagenet_bs64_swin_224.py',
    'mmpretrain::_base_/schedules/imagenet_bs1024_adamw_swin.py',
    'mmpretrain::_base_/default_runtime.py',
]

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmtoken.STViTRSwin',
        arch='tiny',
        form='classification',
        drop_path_rate=0.2,
        out_indices=(3,),
    )
)
optim_wrapper = dict(clip_grad=dict(max_norm=5.0))
