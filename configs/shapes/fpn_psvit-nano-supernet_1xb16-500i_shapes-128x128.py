# For tools/misc/search_psvit.py: twice the layers, to choose from, each with a map of its own.
_base_ = './fpn_psvit-nano_1xb16-500i_shapes-128x128.py'

model = dict(
    backbone=dict(
        arch=dict(stages=[(48, 2, (1,) * 4), (96, 3, (1,) * 6), (192, 6, (1,) * 6)]),
        sharing=None,
    )
)
default_hooks = dict(checkpoint=dict(interval=100, max_keep_ckpts=1))
