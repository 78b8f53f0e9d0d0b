# Windows of 8 tokens divide all grids of 256 pixels, so nothing is padded. The third stage has two
# units. It is 2 x 2 windows of 8, or 3 x 3 semantic, tokens: all are in a patch of 15.
_base_ = [
    '../_base_/mmtoken.py',
    '../_base_/models/nuclei_mask-rcnn.py',
    '../_base_/datasets/nuclei_256x256.py',
    '../_base_/schedules/nuclei_500i.py',
]

model = dict(
    backbone=dict(
        arch=dict(depths=(2, 2, 12, 2)),
        window_size=8,
        key_sizes=(16, 24, 15),
    )
)
