"""Reading checkpoints of other projects into our modules."""

from .load import load_into

__all__ = ['load_into']
