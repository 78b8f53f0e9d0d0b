# Mask R-CNN cut down to one class, for hundreds of small objects in an image.
_base_ = './shapes_mask-rcnn.py'

model = dict(
    rpn_head=dict(anchor_generator=dict(scales=[2])),  # of 8 pixels and more
    roi_head=dict(bbox_head=dict(num_classes=1), mask_head=dict(num_classes=1)),
    train_cfg=dict(
        rpn_proposal=dict(nms_pre=1000, max_per_img=500), rcnn=dict(sampler=dict(num=128))
    ),
    test_cfg=dict(rpn=dict(nms_pre=1000, max_per_img=800), rcnn=dict(max_per_img=300)),
)
