"""Base class of the backbones on Swin.

Source: Swin Transformer, arXiv 2103.14030.
"""

from collections.abc import Iterable, Mapping
from typing import ClassVar

import torch.nn as nn
from torch import Tensor

from ..layers.common.cache import compile_for_size
from ..layers.common.utils import check_heads, join_maps, to_map
from .base import TokenBackbone

PATCH_SIZE = 4  # side of a patch, in pixels


class SwinBackbone(TokenBackbone):
    """Stages at strides 4, 8, 16 and 32, each of half the grid and twice the channels of the last.

    A subclass makes ``patch_embed`` and the stages, which have a ``downsample``, and calls
    :meth:`finish_init` with the latter.

    Args:
        arch: From :meth:`resolve_arch`.
        out_indices: Stages whose maps are returned, in rising order.
        frozen_stages: Stages kept fixed, counted from the stem; -1 freezes nothing.
        norm_eval: Keep batch norms in eval mode while training.
        init_cfg: MMEngine's initialization config.

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
        stages = range(len(arch['depths']))
        channels = [arch['embed_dims'] * 2**i for i in stages]
        strides = [PATCH_SIZE * 2**i for i in stages]
        super().__init__(channels, strides, out_indices, frozen_stages, norm_eval, init_cfg)

    def finish_init(self, stages: Iterable[nn.Module]) -> None:
        """Add the stages and a norm for each map that is returned, and apply freezing."""
        self.layers = nn.ModuleList(stages)
        for i in self.out_indices:
            self.add_module(f'norm{i}', nn.LayerNorm(self.feature_info.channels(i)))
        self.train()

    @classmethod
    def resolve_arch(cls, arch: str | Mapping) -> dict:
        """Look an architecture up in the zoo, or check a user's own.

        Raises:
            ValueError, TypeError: As for :func:`~mmtoken.backbones.base.resolve_arch`; numbers for
                different numbers of stages, heads that do not divide channels.
        """
        arch = cls.full_arch(arch)
        depths, num_heads = tuple(arch['depths']), tuple(arch['num_heads'])
        if not depths or len(depths) != len(num_heads):
            raise ValueError(
                f'depths and num_heads have one number a stage, got depths={depths}, '
                f'num_heads={num_heads}'
            )
        for i, heads in enumerate(num_heads):
            check_heads(arch['embed_dims'] * 2**i, heads, f'stage {i}: ')
        return dict(arch, depths=depths, num_heads=num_heads)

    @classmethod
    def library_baseline(cls, args: Mapping) -> dict:
        """The Swin of mmdet and mmseg."""
        same = ('in_channels', 'window_size', 'drop_path_rate', 'out_indices', 'with_cp')
        return dict(
            type=('mmdet.SwinTransformer', 'mmseg.SwinTransformer'),
            mlp_ratio=int(args['mlp_ratio']),  # theirs takes whole numbers only
            **{name: args[name] for name in same},
            **args['arch'],
        )

    @property
    def unbuilt_keys(self) -> str:
        return rf'{super().unbuilt_keys}|{self.stages_name}\.{self.num_built - 1}\.downsample\..*'

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute dense maps.

        Args:
            x: Images, ``(B, in_channels, H, W)``, any H and W.

        Returns:
            One ``(B, C_i, H_i, W_i)`` per index in ``out_indices``: ``C_i = embed_dims * 2 ** i``,
            ``H_0 = ceil(H / 4)`` and then ``ceil(H_i / 2)``.
        """
        compile_for_size(x)
        x = self.patch_embed(x)  # (B, H_0, W_0, C_0)
        maps = []
        for i, stage in enumerate(self.layers):
            x = stage(x)
            if i in self.out_indices:
                maps.append(to_map(getattr(self, f'norm{i}')(x)))
            if stage.downsample is not None:
                x = stage.downsample(x)  # (B, H_i+1, W_i+1, C_i+1)
        return join_maps(maps)
