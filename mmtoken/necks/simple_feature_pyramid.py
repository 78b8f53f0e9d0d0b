"""A feature pyramid from the maps of a plain backbone.

Source: ViTDet, arXiv 2203.16527, section 3 and appendix A.2. Finer levels may also be unfolded from
the planes of structure-aware tokens, which are those of SWAT, arXiv 2111.13677; this use of them is
ours.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch.nn as nn
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor

from ..arguments import as_tuple
from ..checkpoints.module import CheckpointedModule
from ..layers.swat.planes import unfold_planes
from ..registry import MODELS

Norm = Literal['LN', 'BN'] | None
SCALES = (4.0, 2.0, 1.0, 0.5)
XAVIER = dict(type='Xavier', layer='Conv2d', distribution='uniform')
TRANSFORMER_INIT = [dict(type='TruncNormal', layer='Linear', std=0.02), XAVIER]


@MODELS.register_module()
class SimpleFeaturePyramid(CheckpointedModule):
    """Strides 4, 8, 16 and 32 from maps of stride 16, or others from maps of another stride.

    Each level scales a map by transposed convolutions or max-pooling, then projects it by a 1 x 1
    and a 3 x 3 convolution. There are no lateral connections.

    Padding: convolutions and pooling see neighboring places, so only the last two rows and columns
    before the padding of a level differ from those of the image alone.

    Args:
        in_channels: Channels of the maps, a multiple of 4; or one number a map, all equal, as
            mmdet's necks take it.
        out_channels: Channels of every level.
        num_outs: Levels. Those beyond ``scales``, of stride 64 and so on, take every second
            position of the one before.
        multi_level: False makes all levels from the last map, as ViTDet does. True makes the i-th
            level from the i-th of as many maps as ``scales``, as UPerNet on plain ViT does.
        norm: ``'LN'`` (over the channels), ``'BN'``, or None.
        scales: How many times as high and wide as its map each level is, some of 4, 2, 1 and 0.5.
            Maps of stride 8 reach the usual strides with ``(2, 1, 0.5)``.
        init_cfg: MMEngine's initialization config.
        plane_size: Side of the planes in the channels of structure-aware tokens, in cells:
            ``plane_size`` of :class:`mmtoken.SWATDeiT`. Finer levels then unfold these planes,
            without parameters, instead of using transposed convolutions. No value is lost, but a
            quarter of the channels remains at scale 2 and a sixteenth at scale 4: with 384
            channels, the 1 x 1 convolution there sees 24, not 96. None for other maps.

    Raises:
        ValueError: Bad argument values; the message says what is allowed.
    """

    dense_args: ClassVar[dict] = dict(plane_size=None)  # behind a dense twin

    def __init__(
        self,
        in_channels: int | Sequence[int],
        out_channels: int = 256,
        num_outs: int = 5,
        multi_level: bool = False,
        norm: Norm = 'LN',
        scales: Sequence[float] = SCALES,
        init_cfg: dict | list[dict] | None = XAVIER,
        plane_size: int | None = None,
    ) -> None:
        super().__init__(init_cfg)
        in_channels, scales = one_width(in_channels), as_tuple(scales)
        falling = all(a > b for a, b in zip(scales, scales[1:], strict=False))
        if not scales or not falling or not set(scales) <= set(SCALES):
            raise ValueError(f'scales must be some of {SCALES}, falling, got {tuple(scales)}')
        if in_channels % 4:
            raise ValueError(f'in_channels must be a multiple of 4, got {in_channels}')
        if num_outs < 1 or (multi_level and num_outs < len(scales)):
            least = f'at least {len(scales)} with multi_level' if multi_level else 'at least 1'
            raise ValueError(f'num_outs must be {least}, got {num_outs}')
        if plane_size is not None:
            _check_planes(plane_size, in_channels, int(max(scales)))
        if norm not in ('LN', 'BN', None):
            raise ValueError(f"norm must be 'LN', 'BN' or None, got {norm!r}")
        self.in_channels = in_channels
        self.num_outs = num_outs
        self.multi_level = multi_level
        self.levels = nn.ModuleList(
            _level(scale, in_channels, out_channels, norm, plane_size)
            for scale in scales[:num_outs]
        )

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Build the pyramid.

        Args:
            inputs: Maps ``(B, in_channels, H, W)``: as many as ``scales`` with ``multi_level``,
                otherwise one or more, of which the last is used.

        Returns:
            Maps ``(B, out_channels, H_i, W_i)``: ``scales`` times the height and width, rounded
            up, and then half of the one before.

        Raises:
            TypeError: Tokens instead of maps.
            ValueError: Another number of maps, or of channels.
        """
        maps = self.per_level(inputs)
        for map_ in maps:
            if not isinstance(map_, Tensor):
                raise TypeError(
                    f'{type(self).__name__} takes maps, got {type(map_).__name__}; for a backbone '
                    "with out_type='tokens' use the neck that restores its tokens"
                )
            check_channels(self, self.in_channels, map_.shape[1])
        # RoIAlign of mmcv misreads maps in the channels-last format, which LayerNorm leaves behind.
        outs = [level(x).contiguous() for level, x in zip(self.levels, maps, strict=True)]
        while len(outs) < self.num_outs:
            outs.append(F.max_pool2d(outs[-1], 1, stride=2))
        return tuple(outs)

    def per_level(self, inputs: Sequence) -> list:
        """The input of each level."""
        if not self.multi_level:
            return [inputs[-1]] * len(self.levels)
        if len(inputs) != len(self.levels):
            raise ValueError(f'multi_level takes {len(self.levels)} maps, got {len(inputs)}')
        return list(inputs)


def one_width(in_channels: int | Sequence[int]) -> int:
    """The number of channels that all maps have.

    Raises:
        ValueError: They have several; the message names the neck for such maps.
    """
    widths = set(as_tuple(in_channels))
    if len(widths) != 1:
        raise ValueError(
            'the maps of a plain backbone have one width, got in_channels='
            f'{as_tuple(in_channels)}; behind a backbone of several widths use FPN of mmdet'
        )
    return widths.pop()


def check_channels(neck: nn.Module, in_channels: int, found: int) -> None:
    """Refuse maps of other channels than a neck was built for, with ValueError."""
    if found != in_channels:
        raise ValueError(
            f'{type(neck).__name__} was built for in_channels={in_channels}, got {found} channels'
        )


class UnfoldPlanes(nn.Module):
    """Cut the planes of a map of structure-aware tokens into a finer map.

    Args:
        side: Side of a plane, in cells.
        scale: How many times as high and wide the finer map is.
    """

    def __init__(self, side: int, scale: int) -> None:
        super().__init__()
        self.side = side
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W) -> (B, C / scale**2, H * scale, W * scale)``."""
        return unfold_planes(x.permute(0, 2, 3, 1), self.side, self.scale).permute(0, 3, 1, 2)

    def extra_repr(self) -> str:
        return f'side={self.side}, scale={self.scale}'


def _check_planes(plane_size: int, in_channels: int, scale: int) -> None:
    """Refuse planes that the map does not have, or that cannot be cut.

    Raises:
        ValueError: The message says what is allowed.
    """
    if plane_size < 1 or in_channels % plane_size**2:
        raise ValueError(
            'plane_size must be positive and in_channels a multiple of its square, got '
            f'plane_size={plane_size}, in_channels={in_channels}'
        )
    if scale > 1 and plane_size % scale:
        raise ValueError(f'plane_size must be a multiple of scale {scale}, got {plane_size}')


def _level(
    scale: float, in_channels: int, out_channels: int, norm: Norm, plane_size: int | None
) -> nn.Sequential:
    half, quarter = in_channels // 2, in_channels // 4
    if scale > 1 and plane_size is not None:
        channels = in_channels // int(scale) ** 2
        layers = [UnfoldPlanes(plane_size, int(scale))]
    elif scale == 4:
        channels = quarter
        layers = [
            nn.ConvTranspose2d(in_channels, half, 2, stride=2),
            *_norm(norm, half),
            nn.GELU(),
            nn.ConvTranspose2d(half, quarter, 2, stride=2),
        ]
    elif scale == 2:
        channels, layers = half, [nn.ConvTranspose2d(in_channels, half, 2, stride=2)]
    elif scale == 1:
        channels, layers = in_channels, []
    else:
        channels, layers = in_channels, [nn.MaxPool2d(2, ceil_mode=True)]
    return nn.Sequential(
        *layers,
        nn.Conv2d(channels, out_channels, 1, bias=norm is None),
        *_norm(norm, out_channels),
        nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=norm is None),
        *_norm(norm, out_channels),
    )


def _norm(norm: Norm, channels: int) -> list[nn.Module]:
    if norm is None:
        return []
    return [LayerNorm2d(channels) if norm == 'LN' else nn.BatchNorm2d(channels)]
