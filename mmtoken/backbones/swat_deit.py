"""SWAT on plain ViT.

Source: SWAT, arXiv 2111.13677; released code, github.com/kkahatapitiya/SWAT (MIT), its DeiT.
Parameter names are timm's where timm has the layer.
"""

from collections.abc import Mapping
from functools import partial

import torch.nn as nn
from torch import Tensor

from ..layers.common.vit import ViTBlock
from ..layers.swat.structured import StructuredBlock, StructuredStem, check_planes
from ..registry import MODELS
from .vit_base import DenseLayout, PlainBackbone


@MODELS.register_module()
class SWATDeiT(PlainBackbone):
    """DeiT on tokens that keep the spatial structure of their patches.

    The channels of a token are planes of ``plane_size`` x ``plane_size`` cells. Projections of
    attention convolve inside the planes (kernel 3), and the MLP convolves the token grid. No token
    is left out: the small size spends 7 % more than DeiT on images of 224 pixels, and 3 % more at
    800 x 1280. :class:`mmtoken.SimpleFeaturePyramid` can unfold its tokens to finer maps.

    There is no class token: the paper pools over the tokens.

    Padding: the padding of a batch is treated like the image. Attention sees all of it, positions
    are resampled to the padded grid, and ``out_type='avg_featmap'`` averages over it, so the maps
    of an image differ, everywhere, from those it has alone.

    Args:
        arch: ``'tiny'``, ``'small'``, ``'base32'``, or a dict with the keys ``embed_dims``,
            ``num_layers``, ``num_heads``, ``feedforward_channels``, ``patch_size`` (in pixels) and
            ``mlp_kernel`` (side of the MLP's convolution, odd, in tokens).
        structured: False gives the dense twin: DeiT.
        plane_size: Side of a plane, in cells; ``embed_dims`` is a multiple of its square, and
            ``patch_size`` of its double.
        kwargs: As for :class:`~mmtoken.backbones.vit_base.PlainBackbone`, without ``patch_size``,
            ``cls_token``, ``num_registers`` and ``layer_scale``.

    Raises:
        ValueError: Bad argument values; the message says what is allowed.
        TypeError: ``arch`` is neither a name nor a dict.

    Example:
        >>> import torch
        >>> arch = dict(
        ...     embed_dims=32, num_layers=2, num_heads=2, feedforward_channels=64, patch_size=16,
        ...     mlp_kernel=3,
        ... )
        >>> SWATDeiT(arch, plane_size=4)(torch.zeros(1, 3, 64, 96))[0].shape
        torch.Size([1, 32, 4, 6])
    """

    out_types = ('map', 'avg_featmap')
    fixed_args = ('patch_size', 'cls_token', 'num_registers', 'layer_scale')
    twin_args = dict(structured=False)
    arch_keys = (*PlainBackbone.arch_keys, 'patch_size', 'mlp_kernel')
    arch_zoo = dict(
        tiny=dict(PlainBackbone.arch_zoo['tiny'], patch_size=16, mlp_kernel=5),
        small=dict(PlainBackbone.arch_zoo['small'], patch_size=16, mlp_kernel=5),
        base32=dict(PlainBackbone.arch_zoo['base'], patch_size=32, mlp_kernel=3),
    )

    def __init__(
        self,
        arch: str | Mapping = 'small',
        structured: bool = True,
        plane_size: int = 8,
        **kwargs,
    ) -> None:
        sizes = self.resolve_arch(arch)
        mlp_kernel = sizes['mlp_kernel']
        if structured:
            check_planes(sizes['embed_dims'], sizes['patch_size'], plane_size)
            if mlp_kernel < 1 or mlp_kernel % 2 == 0:
                raise ValueError(f'mlp_kernel must be odd and positive, got {mlp_kernel}')
        super().__init__(arch, patch_size=sizes['patch_size'], **kwargs)
        self.structured, block = structured, ViTBlock
        if structured:
            self.patch_embed = StructuredStem(
                self.embed_dims, self.patch_size, plane_size, kernel_size=4,
                in_channels=self.patch_embed.proj.in_channels, position=True,
            )  # fmt: skip
            block = partial(StructuredBlock, side=plane_size, mlp_kernel=mlp_kernel)
        self.blocks = nn.ModuleList(
            block(drop_path=rate, **self.block_args) for rate in self.drop_rates
        )
        self.finish_init()

    @classmethod
    def library_baseline(cls, args: Mapping) -> dict | None:
        """mmpretrain's ViT."""
        return super().library_baseline(dict(args, patch_size=args['arch']['patch_size']))

    def run_block(
        self, index: int, tokens: Tensor, layout: DenseLayout
    ) -> tuple[Tensor, DenseLayout]:
        if not self.structured:
            return super().run_block(index, tokens, layout)
        grid = tokens.unflatten(1, layout.grid)  # (B, H, W, C)
        return self.checkpoint(self.blocks[index], grid).flatten(1, 2), layout
