_base_ = './mask-rcnn_stvit-r-swin-t_fpn_8xb2-amp-ms-crop-3x_coco.py'

# ImageNet-1k classification weights, released by the authors of STViT-R.
checkpoint = 'https://huggingface.co/csncsn/STViT-R/resolve/main/STViT-R-Swin-S.pth'
model = dict(backbone=dict(arch='small', init_cfg=dict(type='Pretrained', checkpoint=checkpoint)))
