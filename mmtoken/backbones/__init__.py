"""Backbones, one family a file; imported when MMEngine first looks a type up."""

from .stvit_deit import STViTDeiT
from .stvit_r_swin import STViTRSwin

__all__ = ['STViTDeiT', 'STViTRSwin']
