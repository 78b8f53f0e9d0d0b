_base_ = './swat-swin-tiny_8xb96-310e_in1k.py'

model = dict(backbone=dict(arch='small'))
