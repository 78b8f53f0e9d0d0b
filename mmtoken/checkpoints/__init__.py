"""Read checkpoints of this and other projects, and load them into our modules."""

from .convert import convert, detect_source
from .load import fit_to, load_into
from .reader import find_weights, read_checkpoint
from .report import Report

__all__ = [
    'Report',
    'convert',
    'detect_source',
    'find_weights',
    'fit_to',
    'load_into',
    'read_checkpoint',
]
