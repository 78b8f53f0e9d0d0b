"""Losses on how many tokens a network uses."""

from .budget import BudgetLoss

__all__ = ['BudgetLoss']
