"""Recover dense maps from semantic tokens, then build a pyramid."""

from collections.abc import Sequence
from functools import partial

import torch.nn as nn
from torch import Tensor

from ..layers.common.packed import SparseFeatures, unpack_equal
from ..layers.common.rotary import check_rotary, grid_rotation, rotated
from ..layers.common.utils import check_heads, to_map
from ..layers.common.vit import MLPS, NORM_EPS, AttentionFn, full_attention, mlp_layer
from ..layers.stvit.semantic_vit import SemanticRecovery, turn_tiles
from ..registry import MODELS
from .simple_feature_pyramid import SCALES, TRANSFORMER_INIT, Norm, one_width
from .token_pyramid import SparseFeaturePyramid


@MODELS.register_module()
class SemanticRecoveryNeck(SparseFeaturePyramid):
    """The recovery of :class:`mmtoken.STViTDeiT` in the neck, for ``out_type='tokens'``.

    The layers are those of the backbone with ``out_type='map'``, one for each tap that is used, and
    give the same maps from the same weights, if ``mlp``, ``norm_eps``, ``qk_norm``, ``rotary`` and
    ``semantic_size`` are those of the backbone and its ``arch``.

    Padding: every image token queries all semantic tokens, those of padding included, so the maps
    of an image differ, everywhere, from those it has alone.

    Args:
        in_channels: Channels of a token.
        num_heads: Attention heads of the recovery.
        dense_taps: How many of the taps in use, from the first, are outputs of the backbone's base
            layers, which need no recovery.
        mlp_ratio: Hidden channels of the recovery's MLP over ``in_channels``.
        qkv_bias: Biases for queries, keys and values.
        recovery_scale: Initial LayerScale of the recovery; None for none.
        mlp: ``'gelu'``, ``'swiglu'`` or ``'swiglu-norm'``.
        norm_eps: Epsilon of norms.
        qk_norm: Normalize queries and keys.
        rotary: Kind of rotary positions, ``'dinov3'`` or ``'eva02'``; None for none.
        semantic_size: Side of the tile that became one semantic token, in image tokens: where it
            is, for rotary positions.
        out_channels, num_outs, multi_level, norm, scales: The pyramid, see
            :class:`mmtoken.SimpleFeaturePyramid`.
        init_cfg: MMEngine's initialization config.

    Raises:
        ValueError: Bad argument values; the message says what is allowed.

    Example:
        >>> import torch
        >>> from mmtoken.backbones import STViTDeiT
        >>> arch = dict(embed_dims=32, num_layers=3, num_heads=2, feedforward_channels=64)
        >>> backbone = STViTDeiT(arch, semantic_size=2, base_layers=1, out_type='tokens')
        >>> neck = SemanticRecoveryNeck(32, num_heads=2, out_channels=16)
        >>> [tuple(m.shape[2:]) for m in neck(backbone(torch.zeros(1, 3, 64, 64)))]
        [(16, 16), (8, 8), (4, 4), (2, 2), (1, 1)]
    """

    def __init__(
        self,
        in_channels: int | Sequence[int],
        num_heads: int,
        dense_taps: int = 0,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        recovery_scale: float | None = None,
        mlp: str = 'gelu',
        norm_eps: float = NORM_EPS,
        qk_norm: bool = False,
        rotary: str | None = None,
        semantic_size: int = 4,
        out_channels: int = 256,
        num_outs: int = 5,
        multi_level: bool = False,
        norm: Norm = 'LN',
        scales: Sequence[float] = SCALES,
        init_cfg: dict | list[dict] | None = TRANSFORMER_INIT,
    ) -> None:
        in_channels = one_width(in_channels)
        super().__init__(in_channels, out_channels, num_outs, multi_level, norm, scales, init_cfg)
        check_heads(in_channels, num_heads)
        check_rotary(rotary, in_channels, num_heads)
        if mlp not in MLPS:
            raise ValueError(f'mlp must be one of {MLPS}, got {mlp!r}')
        if not 0 <= dense_taps <= self.num_taps:
            raise ValueError(
                f'dense_taps must be from 0 to {self.num_taps}, the taps in use, got {dense_taps}'
            )
        self.dense_taps = dense_taps
        self.rotary, self.semantic_size = rotary, semantic_size
        self.head_dims = in_channels // num_heads
        norm_layer = partial(nn.LayerNorm, eps=norm_eps)
        self.recover = nn.ModuleList(
            SemanticRecovery(
                in_channels,
                num_heads=num_heads,
                feedforward_channels=int(in_channels * mlp_ratio),
                qkv_bias=qkv_bias,
                layer_scale=recovery_scale,
                mlp=mlp_layer(mlp, norm_layer),
                norm_eps=norm_eps,
                qk_norm=norm_layer if qk_norm else None,
            )
            for _ in range(self.num_taps - dense_taps)
        )

    def restore(self, index: int, features: SparseFeatures) -> Tensor:
        """The map of one of the taps in use: ``(B, in_channels, H, W)``.

        Raises:
            ValueError: The tap has semantic tokens where it should have none or the other way
                round, or has tokens of another method.
        """
        if features.layout is not None:
            raise ValueError(
                f'{type(self).__name__} recovers from semantic tokens, those of mmtoken.STViTDeiT; '
                f'tap {index} has a layout, as those of mmtoken.MSViT, which are for '
                'mmtoken.MixedScaleNeck'
            )
        height, width = features.grid
        image = unpack_equal(features)
        num_semantic = image.shape[1] - height * width
        dense = index < self.dense_taps
        if dense != (num_semantic == 0):
            raise ValueError(
                f'tap {index} has {num_semantic} semantic tokens an image, which does not agree '
                f'with dense_taps={self.dense_taps}'
            )
        if not dense:
            image, semantic = image.split([height * width, num_semantic], dim=1)
            recover = self.recover[index - self.dense_taps]
            attn_fn = self.attn_fn(features.grid, semantic)
            recover.record(image, semantic, features.grid, attn_fn)
            image = recover(image, semantic, attn_fn)
        return to_map(image.unflatten(1, features.grid))

    def attn_fn(self, grid: tuple[int, int], semantic: Tensor) -> AttentionFn:
        """Attention of the image tokens of a grid to semantic tokens, ``(B, N, C)``.

        Raises:
            ValueError: Tiles of ``semantic_size`` would be another number.
        """
        if self.rotary is None:
            return full_attention
        rotation = grid_rotation(self.rotary, grid, 0, self.head_dims, semantic.device)
        keys = turn_tiles(rotation, grid, self.semantic_size)
        if len(keys.cos_sin) != semantic.shape[1]:
            raise ValueError(
                f'there are {semantic.shape[1]} semantic tokens of {grid} image tokens, which does '
                f'not agree with semantic_size={self.semantic_size}'
            )
        return rotated(full_attention, rotation, keys)
