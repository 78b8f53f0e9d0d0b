"""Base class of the necks that restore tokens."""

from abc import abstractmethod
from collections.abc import Sequence

from torch import Tensor

from ..layers.common.packed import SparseFeatures
from .simple_feature_pyramid import SimpleFeaturePyramid, check_channels


class SparseFeaturePyramid(SimpleFeaturePyramid):
    """Restore tokens to maps, then build a pyramid from these.

    Subclasses implement :meth:`restore`.
    """

    twin_type = 'mmtoken.SimpleFeaturePyramid'

    @property
    def num_taps(self) -> int:
        """Taps in use."""
        return len(self.levels) if self.multi_level else 1

    def forward(self, inputs: Sequence[SparseFeatures]) -> tuple[Tensor, ...]:
        """Restore the maps and build the pyramid.

        Args:
            inputs: The taps: as many as ``scales`` with ``multi_level``, otherwise one or more, of
                which the last is used.

        Returns:
            As :class:`mmtoken.SimpleFeaturePyramid`.

        Raises:
            TypeError: Maps instead of tokens.
            ValueError: Another number of taps or of channels, or taps that this neck does not
                restore.
        """
        taps = self.per_level(inputs) if self.multi_level else [inputs[-1]]
        for tap in taps:
            if not isinstance(tap, SparseFeatures):
                raise TypeError(
                    f'{type(self).__name__} takes the SparseFeatures of a backbone with out_type='
                    f"'tokens', got {type(tap).__name__}; for maps use {self.twin_type}"
                )
            check_channels(self, self.in_channels, tap.tokens.shape[-1])
        return super().forward([self.restore(i, tap) for i, tap in enumerate(taps)])

    @abstractmethod
    def restore(self, index: int, features: SparseFeatures) -> Tensor:
        """The map of one of the taps in use: ``(B, in_channels, H, W)``."""
