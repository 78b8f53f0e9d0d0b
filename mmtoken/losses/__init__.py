"""Losses on how many tokens a network uses."""

from .batch_shaping import BatchShapingLoss
from .budget import BudgetLoss
from .rate import RateLoss

__all__ = ['BatchShapingLoss', 'BudgetLoss', 'RateLoss']
