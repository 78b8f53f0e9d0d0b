"""From token grids to the maps that necks and heads take."""

from torch import Tensor


def to_map(x: Tensor) -> Tensor:
    """Tokens on their grid to a map: ``(B, H, W, C) -> (B, C, H, W)``.

    The map is contiguous: RoIAlign of mmcv misreads maps in the channels-last format.
    """
    return x.permute(0, 3, 1, 2).contiguous()
