"""Families of foreign checkpoints, one a file."""

from .dinov2 import DINOV2
from .pvt import PVT
from .source import Layout, Source
from .stvit_r import STVIT_R
from .swin import SWIN
from .vit import DEIT, VIT
from .vtpack import VTPACK

# Asked in this order whose a file is
SOURCES: dict[str, Source] = {s.name: s for s in (STVIT_R, SWIN, VTPACK, PVT, DINOV2, DEIT, VIT)}

__all__ = ['SOURCES', 'Layout', 'Source']
