"""Families of foreign checkpoints, one a file."""

from .source import Layout, Source
from .stvit_r import STVIT_R
from .swin import SWIN
from .vit import DEIT, VIT

# Asked in this order whose a file is
SOURCES: dict[str, Source] = {s.name: s for s in (STVIT_R, SWIN, DEIT, VIT)}

__all__ = ['SOURCES', 'Layout', 'Source']
