"""What MMEngine's runner takes from this package beside models."""

from .image_sizes import follow_image_sizes
from .layer_decay import LayerDecayOptimWrapperConstructor
from .token_loss_hook import TokenLossHook

__all__ = ['LayerDecayOptimWrapperConstructor', 'TokenLossHook', 'follow_image_sizes']
