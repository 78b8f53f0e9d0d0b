"""Losses on how many tokens a network uses."""

from .batch_shaping import BatchShapingLoss
from .budget import BudgetLoss
from .rate import CoarseRatioLoss

__all__ = ['BatchShapingLoss', 'BudgetLoss', 'CoarseRatioLoss']
