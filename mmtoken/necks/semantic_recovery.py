"""Recover dense maps from semantic tokens, then build a pyramid."""

from collections.abc import Sequence

import torch.nn as nn
from torch import Tensor

from ..layers.common.packed import SparseFeatures, unpack_equal
from ..layers.common.utils import check_heads, to_map
from ..layers.stvit.groups import record_attended
from ..layers.stvit.semantic_vit import SemanticRecovery
from ..registry import MODELS
from .simple_feature_pyramid import SCALES, TRANSFORMER_INIT, Norm, one_width
from .token_pyramid import SparseFeaturePyramid


@MODELS.register_module()
class SemanticRecoveryNeck(SparseFeaturePyramid):
    """The recovery of :class:`mmtoken.STViTDeiT` in the neck, for ``out_type='tokens'``.

    The layers are those of the backbone with ``out_type='map'``, one for each tap that is used, and
    give the same maps from the same weights.

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
        if not 0 <= dense_taps <= self.num_taps:
            raise ValueError(
                f'dense_taps must be from 0 to {self.num_taps}, the taps in use, got {dense_taps}'
            )
        self.dense_taps = dense_taps
        self.recover = nn.ModuleList(
            SemanticRecovery(
                in_channels,
                num_heads=num_heads,
                feedforward_channels=int(in_channels * mlp_ratio),
                qkv_bias=qkv_bias,
                layer_scale=recovery_scale,
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
            record_attended(recover, image, semantic, features.grid)
            image = recover(image, semantic)
        return to_map(image.unflatten(1, features.grid))
