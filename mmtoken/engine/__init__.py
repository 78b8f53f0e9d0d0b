"""Hooks and constructors for MMEngine's runner."""

from .image_sizes import follow_image_sizes
from .label_range_hook import LabelRangeHook
from .layer_decay import LayerDecayOptimWrapperConstructor
from .random_state_hook import RandomStateHook
from .token_loss_hook import TokenLossHook
from .token_map_hook import TokenMapHook
from .twin_distill_hook import TwinDistillHook

__all__ = [
    'LabelRangeHook',
    'LayerDecayOptimWrapperConstructor',
    'RandomStateHook',
    'TokenLossHook',
    'TokenMapHook',
    'TwinDistillHook',
    'follow_image_sizes',
]
