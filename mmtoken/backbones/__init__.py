"""Backbones, one a file; imported when MMEngine first looks a type up."""

from .dge_deit import DGEDeiT
from .dge_dpvt import DGEDPVT
from .dge_pvt import DGEPVT
from .merge_vit import MergeViT
from .msvit import MSViT
from .psvit import PSViT
from .stvit_deit import STViTDeiT
from .stvit_r_swin import STViTRSwin
from .swat_deit import SWATDeiT
from .swat_swin import SWATSwin

__all__ = [
    'DGEDPVT',
    'DGEDeiT',
    'DGEPVT',
    'MSViT',
    'MergeViT',
    'PSViT',
    'STViTDeiT',
    'STViTRSwin',
    'SWATDeiT',
    'SWATSwin',
]
