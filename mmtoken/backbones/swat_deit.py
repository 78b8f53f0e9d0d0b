"""SWAT on plain ViT.

Source: SWAT, arXiv 2111.13677; released code, github.com/kkahatapitiya/SWAT (MIT), its DeiT.
Parameter names are timm's where timm has the layer.
"""

from collections.abc import Mapping

import torch.nn as nn
from torch import Tensor

from ..layers.common.vit import ViTBlock
from ..layers.swat.blocks import StructuredBlock
from ..layers.swat.stem import STRIDE, StructuredStem
from ..registry import MODELS
from .base import DenseLayout, PlainBackbone


@MODELS.register_module()
class SWATDeiT(PlainBackbone):
    """DeiT on tokens that keep the spatial structure of their patches.

    The channels of a token are planes of ``plane_size`` x ``plane_size`` cells. Projections of
    attention convolve inside the planes (kernel 3), and the MLP convolves the token grid. No token
    is left out: the small size spends 7 % more than DeiT on images of 224 pixels, and 3 % more at
    800 x 1280. :class:`mmtoken.SimpleFeaturePyramid` can unfold its tokens to finer maps.

    There is no class token: the paper pools over the tokens.

    Padding: the padding of a batch is image like any other. Attention sees all of it, positions are
    resampled to the padded grid, and ``out_type='avg_featmap'`` averages over it: an image has
    other maps, everywhere, than alone.

    Args:
        arch: ``'tiny'``, ``'small'``, ``'base32'``, or a dict with the keys ``embed_dims``,
            ``num_layers``, ``num_heads``, ``feedforward_channels``, ``patch_size`` (in pixels) and
            ``mlp_kernel`` (side of the MLP's convolution, odd, in tokens).
        structured: False gives the dense twin: DeiT.
        plane_size: Side of a plane, in cells; ``embed_dims`` is a multiple of its square, and
            ``patch_size`` of its double.
        kwargs: As for :class:`~mmtoken.backbones.base.PlainBackbone`, without ``patch_size``,
            ``cls_token``, ``num_registers`` and ``layer_scale``.

    Raises:
        ValueError: Bad argument values; the message says what is allowed.
        TypeError: ``arch`` is neither a name nor a dict.
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
        if structured:
            check_planes(plane_size, **sizes)
        super().__init__(arch, patch_size=sizes['patch_size'], **kwargs)
        if structured:
            self.patch_embed = StructuredStem(
                self.embed_dims, self.patch_size, plane_size, kernel_size=4,
                in_channels=self.patch_embed.proj.in_channels, position=True,
            )  # fmt: skip
        self.structured = structured
        self.blocks = nn.ModuleList(
            StructuredBlock(
                side=plane_size, mlp_kernel=sizes['mlp_kernel'], drop_path=rate, **self.block_args
            )
            if structured
            else ViTBlock(drop_path=rate, **self.block_args)
            for rate in self.drop_rates
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


def check_planes(
    plane_size: int, embed_dims: int, patch_size: int, mlp_kernel: int, **others
) -> None:
    """Refuse sizes that structured tokens cannot have.

    Raises:
        ValueError: The message says what is allowed.
    """
    if plane_size < 1:
        raise ValueError(f'plane_size must be at least 1, got {plane_size}')
    if embed_dims % plane_size**2:
        raise ValueError(
            f'embed_dims must be a multiple of plane_size**2 = {plane_size**2}, got {embed_dims}'
        )
    if patch_size < 1 or patch_size % (STRIDE * plane_size):
        raise ValueError(
            f'patch_size must be a multiple of 2 * plane_size = {STRIDE * plane_size}, '
            f'got {patch_size}'
        )
    if mlp_kernel < 1 or mlp_kernel % 2 == 0:
        raise ValueError(f'mlp_kernel must be odd and positive, got {mlp_kernel}')
