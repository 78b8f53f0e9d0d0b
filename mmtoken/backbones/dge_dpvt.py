"""DGE on Pyramid Vision Transformers with deformable attention.

Sources: as for :mod:`~mmtoken.backbones.dge_pvt`; the released code has deformable PVT without
dynamic granularity.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch.nn as nn

from ..layers.dge.deformable import DeformableAttention
from ..registry import MODELS
from .base import resolve_arch
from .dge_pvt import DEPTHS, DGEPVT, WIDTHS


@MODELS.register_module()
class DGEDPVT(DGEPVT):
    """Deformable PVT whose blocks select a token granularity for each region.

    Like :class:`mmtoken.DGEPVT`, with deformable attention (:mod:`mmtoken.layers.dge.deformable`)
    in place of spatial reduction, and without a class token. The release has the dense network
    only; that a query samples around the center of its cell is our choice.

    Padding: as for :class:`mmtoken.DGEPVT`; a query reads little of it, since it samples only a few
    positions.

    Args:
        arch: ``'tiny'``, ``'small'``, or a dict with the keys ``embed_dims``, ``depths``,
            ``num_heads`` and ``mlp_ratios``.
        num_points: Positions that each head samples for a query.
        kwargs: As for :class:`mmtoken.DGEPVT`, without ``cls_token``.

    Raises:
        ValueError, TypeError: As for :class:`mmtoken.DGEPVT`.

    Example:
        >>> import torch
        >>> arch = dict(embed_dims=(8, 16), depths=(1, 1), num_heads=(1, 2), mlp_ratios=(2, 2))
        >>> model = DGEDPVT(arch, num_points=2, out_indices=(1,)).eval()
        >>> [tuple(m.shape) for m in model(torch.zeros(1, 3, 64, 96))]
        [(1, 16, 8, 12)]
    """

    fixed_args = ('cls_token',)
    arch_keys = (*WIDTHS, 'depths', 'num_points')
    arch_zoo: ClassVar[dict[str, dict]] = {
        name: dict(WIDTHS, depths=DEPTHS[name]) for name in ('tiny', 'small')
    }

    def __init__(self, arch: str | Mapping = 'small', num_points: int = 4, **kwargs) -> None:
        arch = resolve_arch(arch, self.arch_zoo, self.arch_keys[:-1])
        arch['num_points'] = (num_points,) * len(arch['depths'])
        super().__init__(arch, **kwargs)

    @classmethod
    def library_baseline(cls, args: Mapping) -> None:
        """No library has a deformable PVT."""

    @staticmethod
    def make_attention(arch: Mapping, stage: int, qkv_bias: bool) -> nn.Module:
        dims, heads = arch['embed_dims'][stage], arch['num_heads'][stage]
        return DeformableAttention(dims, heads, arch['num_points'][stage])
