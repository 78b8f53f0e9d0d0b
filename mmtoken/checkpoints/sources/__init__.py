"""Families of foreign checkpoints, one a file."""

from .dinov2 import DINOV2
from .pvt import PVT
from .rotary_vit import ROTARY_VIT
from .source import Layout, Source
from .stvit_r import STVIT_R
from .swat import SWAT
from .swin import SWIN
from .vit import DEIT, VIT
from .vtpack import VTPACK

# Asked in this order whose a file is
FAMILIES = (STVIT_R, SWAT, SWIN, VTPACK, PVT, ROTARY_VIT, DINOV2, DEIT, VIT)
SOURCES: dict[str, Source] = {family.name: family for family in FAMILIES}

__all__ = ['SOURCES', 'Layout', 'Source']
