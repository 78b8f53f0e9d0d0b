# AdamW as PVT's Mask R-CNN is trained with, 12 epochs. Weight decay spares nothing.
_base_ = 'mmdet::_base_/schedules/schedule_1x.py'

optim_wrapper = dict(optimizer=dict(_delete_=True, type='AdamW', lr=2e-4, weight_decay=1e-4))
