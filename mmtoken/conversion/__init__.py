"""Turn configs and checkpoints of dense models into those of sparse ones."""

from .methods import METHODS, TRAINING_FREE
from .sparsify import Sparsified, sparsify

__all__ = ['METHODS', 'TRAINING_FREE', 'Sparsified', 'sparsify']
