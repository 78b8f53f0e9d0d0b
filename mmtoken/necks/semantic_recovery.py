"""Recover dense maps from semantic tokens, then build a pyramid."""

from collections.abc import Sequence

import torch.nn as nn
from torch import Tensor

from ..layers.common.packed import SparseFeatures, unpack_equal
from ..layers.common.utils import to_map
from ..layers.stvit.semantic_vit import SemanticRecovery
from ..registry import MODELS
from .simple_feature_pyramid import SCALES, XAVIER, Norm, one_width
from .token_pyramid import SparseFeaturePyramid

INIT = [dict(type='TruncNormal', layer='Linear', std=0.02), XAVIER]


@MODELS.register_module()
class SemanticRecoveryNeck(SparseFeaturePyramid):
    """The recovery of :class:`mmtoken.STViTDeiT` in the neck, for ``out_type='tokens'``.

    The layers are those the backbone has with ``out_type='map'``, one for each tap that is used,
    and give the same maps from the same weights.

    Padding: every image token queries all semantic tokens, those of padding too: an image has other
    maps, everywhere, than alone.

    Args:
        in_channels: Channels of a token.
        num_heads: Attention heads of the recovery.
        dense_taps: How many of the taps in use, from the first, lie in the base layers of the
            backbone and so need no recovery.
        mlp_ratio: Hidden channels of the recovery's MLP over ``in_channels``.
        qkv_bias: Biases for queries, keys and values.
        recovery_scale: Initial LayerScale of the recovery; None for none.
        out_channels, num_outs, multi_level, norm, scales: The pyramid, see
            :class:`mmtoken.SimpleFeaturePyramid`.
        init_cfg: MMEngine's initialisation config.

    Raises:
        ValueError: Bad argument values; the message says what is allowed.
    """

    restore_args = ('num_heads', 'dense_taps', 'mlp_ratio', 'qkv_bias', 'recovery_scale')

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
        init_cfg: dict | list[dict] | None = INIT,
    ) -> None:
        in_channels = one_width(in_channels)
        super().__init__(in_channels, out_channels, num_outs, multi_level, norm, scales, init_cfg)
        if in_channels % num_heads:
            raise ValueError(f'in_channels={in_channels} is no multiple of num_heads={num_heads}')
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
            ValueError: The tap is dense where it should be sparse or the other way round, or has
                tokens of another method.
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
            image = self.recover[index - self.dense_taps](image, semantic)
        return to_map(image.unflatten(1, features.grid))
