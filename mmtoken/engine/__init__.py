"""What MMEngine's runner takes from this package beside models."""

from .token_loss_hook import TokenLossHook

__all__ = ['TokenLossHook']
