"""Losses on how many tokens a network uses, and how far maps are from those of another."""

from .batch_shaping import BatchShapingLoss
from .budget import BudgetLoss
from .label_purity import LabelPurityLoss
from .rate import CoarseRatioLoss

__all__ = ['BatchShapingLoss', 'BudgetLoss', 'CoarseRatioLoss', 'LabelPurityLoss']
