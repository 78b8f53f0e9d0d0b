"""Child registries of MMEngine's, scope ``mmtoken``.

A type written as ``mmtoken.STViTRSwin`` resolves from any parent scope (mmdet, mmseg,
mmpretrain). ``locations`` are imported at the first look-up, so nothing heavy is loaded before a
model is built.
"""

from collections.abc import Mapping
from typing import Any

from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import METRICS as MMENGINE_METRICS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS as MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS
from mmengine.registry import Registry
from torch import nn

MODELS = Registry(
    'model',
    parent=MMENGINE_MODELS,
    locations=['mmtoken.backbones', 'mmtoken.necks', 'mmtoken.losses'],
)
HOOKS = Registry('hook', parent=MMENGINE_HOOKS, locations=['mmtoken.engine'])
METRICS = Registry('metric', parent=MMENGINE_METRICS, locations=['mmtoken.evaluation'])
OPTIM_WRAPPER_CONSTRUCTORS = Registry(
    'optimizer wrapper constructor',
    parent=MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS,
    locations=['mmtoken.engine'],
)
ALL = (MODELS, HOOKS, METRICS, OPTIM_WRAPPER_CONSTRUCTORS)


def build_loss(cfg: Any, argument: str, usual: str) -> nn.Module:
    """Build a loss from what an argument says of it.

    Args:
        cfg: A dict with the ``type``.
        argument: Its name, for messages.
        usual: The type that is usual there, for messages.

    Raises:
        ValueError: It is no dict, or has no type.
    """
    if not isinstance(cfg, Mapping) or 'type' not in cfg:
        raise ValueError(f"{argument} must be a dict such as dict(type='{usual}'), got {cfg!r}")
    return MODELS.build(cfg)
