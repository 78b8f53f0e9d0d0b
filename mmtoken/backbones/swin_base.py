"""What the backbones on Swin have in common.

Source: Swin Transformer, arXiv 2103.14030.
"""

from collections.abc import Iterable, Mapping
from typing import ClassVar

import torch.nn as nn
from torch import Tensor

from ..layers.common.utils import join_maps, to_map
from .base import TokenBackbone, resolve_arch


class SwinBackbone(TokenBackbone):
    """Stages at strides 4, 8, 16 and 32, each of half the grid and twice the channels of the last.

    A subclass makes ``patch_embed`` and fills ``layers`` with stages that have a ``downsample``,
    then calls :meth:`add_norms`.

    Args:
        arch: From :meth:`resolve_arch`.
        out_indices: Stages whose maps are returned, in rising order.
        frozen_stages: Stages kept fixed, counted from the stem; -1 freezes nothing.
        norm_eval: Keep batch norms in eval mode while training.
        init_cfg: MMEngine's initialisation config.

    Raises:
        ValueError: ``out_indices`` or ``frozen_stages`` out of range.
    """

    arch_zoo: ClassVar[dict[str, dict]]
    arch_keys = ('embed_dims', 'depths', 'num_heads')

    def __init__(
        self,
        arch: dict,
        out_indices: Iterable[int],
        frozen_stages: int = -1,
        norm_eval: bool = False,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        stages = len(arch['depths'])
        super().__init__(stages, out_indices, frozen_stages, norm_eval, init_cfg)
        self.out_channels = tuple(arch['embed_dims'] * 2**i for i in range(stages))

    @classmethod
    def resolve_arch(cls, arch: str | Mapping) -> dict:
        """Look an architecture up in the zoo, or check a user's own.

        Raises:
            ValueError, TypeError: As for :func:`~mmtoken.backbones.base.resolve_arch`; numbers for
                different numbers of stages, heads that do not divide channels.
        """
        arch = resolve_arch(arch, cls.arch_zoo, cls.arch_keys)
        depths, num_heads = tuple(arch['depths']), tuple(arch['num_heads'])
        if not depths or len(depths) != len(num_heads):
            raise ValueError(
                f'depths and num_heads have one number a stage, got depths={depths}, '
                f'num_heads={num_heads}'
            )
        for i, heads in enumerate(num_heads):
            dims = arch['embed_dims'] * 2**i
            if dims % heads:
                raise ValueError(f'stage {i} has {dims} channels, no multiple of its {heads} heads')
        return dict(arch, depths=depths, num_heads=num_heads)

    @property
    def unbuilt_keys(self) -> str:
        return rf'{super().unbuilt_keys}|{self.stages_name}\.{self.num_built - 1}\.downsample\..*'

    def add_norms(self) -> None:
        """Make a norm for each map that is returned."""
        for i in self.out_indices:
            self.add_module(f'norm{i}', nn.LayerNorm(self.out_channels[i]))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute dense maps.

        Args:
            x: Images, ``(B, in_channels, H, W)``, any H and W.

        Returns:
            One ``(B, C_i, H_i, W_i)`` per index in ``out_indices``: ``C_i = embed_dims * 2 ** i``,
            ``H_0 = ceil(H / 4)`` and then ``ceil(H_i / 2)``.
        """
        x = self.patch_embed(x)
        maps = []
        for i, stage in enumerate(self.layers):
            x = stage(x)
            if i in self.out_indices:
                maps.append(to_map(getattr(self, f'norm{i}')(x)))
            if stage.downsample is not None:
                x = stage.downsample(x)
        return join_maps(maps)


def stage_drop_rates(rate: float, depths: Iterable[int]) -> list[list[float]]:
    """Stochastic depth of each block of each stage, rising linearly from 0 to ``rate``."""
    depths = tuple(depths)
    last = max(sum(depths) - 1, 1)
    starts = (sum(depths[:i]) for i in range(len(depths)))
    return [
        [rate * (start + j) / last for j in range(depth)]
        for start, depth in zip(starts, depths, strict=True)
    ]
