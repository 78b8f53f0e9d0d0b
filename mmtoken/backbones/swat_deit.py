"""SWAT on plain ViT.

Source: SWAT, arXiv 2111.13677; released code, github.com/kkahatapitiya/SWAT (MIT), its DeiT.
Parameter names are timm's where timm has the layer.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
import torch.nn as nn
from torch import Tensor

from ..layers.common.old_tiles import chunked_apply
from ..layers.common.utils import join_maps, run_block, to_map
from ..layers.common.vit import NORM_EPS
from ..layers.swat.blocks import GridBlock, StructuredBlock
from ..layers.swat.stem import STRIDE, StructuredStem
from ..registry import MODELS
from .base import PlainBackbone, check_out_type

OutType = Literal['map', 'avg_featmap']


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
        img_size: Image that the position embedding is laid out for, in pixels: a side, or
            ``(H, W)``. Images of any size are accepted.
        in_channels: Channels of the image.
        qkv_bias: Biases for queries, keys and values.
        drop_path_rate: Stochastic depth of the last block, rising linearly from 0.
        out_indices: Blocks that are tapped, in rising order; negative ones count from the end. The
            last block is normalised, as in mmpretrain.
        out_type: ``'map'``, or for classification ``'avg_featmap'``, the mean over the last block's
            normalised tokens.
        frozen_stages: Blocks kept fixed: 0 freezes the patch and position embedding, 1 the first
            block too, and so on; -1 freezes nothing.
        norm_eval: Of no effect here, since there is no batch norm.
        with_cp: Recompute the activations of each block in backward.
        init_cfg: MMEngine's initialisation config.

    Raises:
        ValueError: Bad argument values; the message says what is allowed.
        TypeError: ``arch`` is neither a name nor a dict.
    """

    twin_args = dict(structured=False)
    ignorable_keys = r'(head|head_dist|norm|fc_norm)\..*|cls_token|dist_token'
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
        img_size: int | tuple[int, int] = 224,
        in_channels: int = 3,
        qkv_bias: bool = True,
        drop_path_rate: float = 0.0,
        out_indices: Sequence[int] = (-1,),
        out_type: OutType = 'map',
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        arch = self.resolve_arch(arch)
        dims, depth, heads = arch['embed_dims'], arch['num_layers'], arch['num_heads']
        patch_size, stem = arch['patch_size'], None
        if structured:
            check_planes(plane_size, **arch)
            stem = StructuredStem(
                dims, patch_size, plane_size, kernel_size=4, in_channels=in_channels, position=True
            )
        super().__init__(
            dims, depth, img_size, patch_size, in_channels,
            out_indices, frozen_stages, norm_eval, init_cfg, patch_embed=stem,
        )  # fmt: skip
        check_out_type(out_type, get_args(OutType), self.out_indices, depth - 1)
        self.out_type = out_type
        self.with_cp = with_cp
        self.out_channels = (dims,) * len(self.out_indices)

        common = dict(
            embed_dims=dims,
            num_heads=heads,
            feedforward_channels=arch['feedforward_channels'],
            qkv_bias=qkv_bias,
        )
        rates = torch.linspace(0, drop_path_rate, depth, device='cpu').tolist()
        self.blocks = nn.ModuleList(
            StructuredBlock(side=plane_size, mlp_kernel=arch['mlp_kernel'], drop_path=r, **common)
            if structured
            else GridBlock(drop_path=r, **common)
            for r in rates[: self.num_built]
        )
        # Only where something uses it, since DDP refuses parameters without a gradient.
        normed = depth - 1 in self.out_indices
        self.norm = nn.LayerNorm(dims, NORM_EPS) if normed else nn.Identity()
        self.train()

    def output_layers(self, index: int) -> list[nn.Module]:
        return [self.norm] if index == self.num_stages - 1 else []

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute the taps.

        Args:
            x: Images, ``(B, in_channels, H, W)``, any H and W.

        Returns:
            One for each of ``out_indices``, according to ``out_type``: a map
            ``(B, C, ceil(H / patch_size), ceil(W / patch_size))``, or a vector ``(B, C)``.
        """
        x, grid = self.embed(x)
        x, taps = x.unflatten(1, grid), []
        for i, block in enumerate(self.blocks):
            x = run_block(block, x, recompute=self.with_cp)
            if i in self.out_indices:
                taps.append(self._tap(i, x))
        return join_maps(taps)

    def _tap(self, index: int, x: Tensor) -> Tensor:
        """The output behind one block."""
        if index == self.num_stages - 1:
            x = chunked_apply(self.norm, x, training=self.training, layers=(self.norm,))
        return to_map(x) if self.out_type == 'map' else x.mean(dim=(1, 2))


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
