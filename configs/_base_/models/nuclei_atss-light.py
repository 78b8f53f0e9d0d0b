# The light ATSS for one class and hundreds of small objects in an image. Boxes alone are scored.
_base_ = './atss_light.py'

model = dict(
    bbox_head=dict(num_classes=1, anchor_generator=dict(octave_base_scale=2)),
    test_cfg=dict(max_per_img=300),
)
