# ImageNet-1k by the released recipe; for `train.py` of mmpretrain.
_base_ = [
    '../_base_/mmtoken.py',
    'mmpretrain::_base_/models/swin_transformer/tiny_224.py',
    '../_base_/common/swat-310e_in1k.py',
]

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmtoken.SWATSwin',
        arch='tiny',
        drop_path_rate=0.0,
        out_indices=(3,),
    ),
    train_cfg=dict(augments=[dict(type='Mixup', alpha=0.5), dict(type='CutMix', alpha=1.0)]),
)
train_dataloader = dict(batch_size=96)
optim_wrapper = dict(optimizer=dict(lr=5.625e-4))
auto_scale_lr = dict(base_batch_size=768)
