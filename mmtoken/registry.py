"""Child registries of MMEngine's, scope ``mmtoken``.

A type written as ``mmtoken.STViTRSwin`` resolves from any parent scope (mmdet, mmseg,
mmpretrain). ``locations`` are imported at the first look-up, so nothing heavy is loaded before a
model is built.
"""

from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import Registry

MODELS = Registry('model', parent=MMENGINE_MODELS, locations=['mmtoken.backbones', 'mmtoken.necks'])
