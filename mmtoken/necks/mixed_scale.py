"""Restore dense maps from tokens of mixed scale, then build a pyramid."""

from collections.abc import Sequence

from mmengine.model import ModuleList
from torch import Tensor

from ..layers.common.packed import SparseFeatures
from ..layers.msvit.mixed_scale import restore_features
from ..layers.msvit.refine import CoarseRefine
from ..registry import MODELS
from .simple_feature_pyramid import SCALES, XAVIER, Norm, one_width
from .token_pyramid import SparseFeaturePyramid


@MODELS.register_module()
class MixedScaleNeck(SparseFeaturePyramid):
    """The maps of :class:`mmtoken.MSViT` restored in the neck, for ``out_type='tokens'``.

    Each coarse token is copied to all places of its region, which gives the maps that the backbone
    has with ``out_type='map'``. Only taps in use are restored.

    Padding: of the maps that it is given, as :class:`mmtoken.SimpleFeaturePyramid`; ``refine`` sees
    further beyond.

    Args:
        in_channels: Channels of a token, a multiple of 4.
        refine: Refine each map knowing where it was coarse, see
            :class:`~mmtoken.layers.msvit.refine.CoarseRefine`. It starts as the identity.
        out_channels, num_outs, multi_level, norm, scales: The pyramid, see
            :class:`mmtoken.SimpleFeaturePyramid`.
        init_cfg: MMEngine's initialization config.

    Raises:
        ValueError: Bad argument values; the message says what is allowed.
    """

    def __init__(
        self,
        in_channels: int | Sequence[int],
        refine: bool = False,
        out_channels: int = 256,
        num_outs: int = 5,
        multi_level: bool = False,
        norm: Norm = 'LN',
        scales: Sequence[float] = SCALES,
        init_cfg: dict | list[dict] | None = XAVIER,
    ) -> None:
        in_channels = one_width(in_channels)
        super().__init__(in_channels, out_channels, num_outs, multi_level, norm, scales, init_cfg)
        self.refine = None
        if refine:
            # MMEngine's list, by which layers inside initialise themselves after ``init_cfg`` did,
            # but before a checkpoint that it may name.
            self.refine = ModuleList(CoarseRefine(in_channels) for _ in range(self.num_taps))

    def restore(self, index: int, features: SparseFeatures) -> Tensor:
        """The map of one of the taps in use: ``(B, in_channels, H, W)``.

        Raises:
            ValueError: Tokens of another method.
        """
        if features.layout is None:
            raise ValueError(
                f'{type(self).__name__} restores tokens of mixed scale, those of mmtoken.MSViT; '
                f'tap {index} has no layout, as those of mmtoken.STViTDeiT, which are for '
                'mmtoken.SemanticRecoveryNeck'
            )
        x, coarse = restore_features(features)
        return x if self.refine is None else self.refine[index](x, coarse)
