"""A gate that decides how fine the tokens of each region of an image are.

Source: MSViT, arXiv 2307.02321: a four-layer MLP on each coarse region by itself. What it reads and
how wide it is were not published; that is decided here, and so are the options to see neighbors and
to choose between more than two scales.
"""

import math

import torch
import torch.nn as nn
from timm.layers import trunc_normal_
from torch import Tensor

from ...arguments import is_count
from .plain import weight_dtype
from .precision import full_precision


class RegionGate(nn.Module):
    """Scores for the scales of each region.

    Args:
        in_channels: Channels of what is known of a region.
        hidden_channels: Of the MLP.
        num_layers: Linear layers of the MLP; each but the last is followed by LayerNorm and GELU.
        start_ratio: Share of regions that are not fine before anything has been learned, in (0, 1).
        kernel_size: Of a depth-wise convolution of regions behind each hidden layer, odd; 1 for
            none. With 3 a gate sees where its region differs from its neighbors.
        num_choices: Scales, K.

    Raises:
        ValueError: An argument out of range.
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int = 64,
        num_layers: int = 4,
        start_ratio: float = 0.1,
        kernel_size: int = 1,
        num_choices: int = 2,
    ) -> None:
        super().__init__()
        if not 0 < start_ratio < 1:
            raise ValueError(f'start_ratio must be between 0 and 1, got {start_ratio}')
        for name, value in dict(hidden_channels=hidden_channels, num_layers=num_layers).items():
            if not is_count(value):
                raise ValueError(f'{name} must be 1 or more, got {value!r}')
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f'kernel_size must be odd and 1 or more, got {kernel_size}')
        self.start_ratio = start_ratio
        layers = []
        for _ in range(num_layers - 1):
            layers.append(nn.Linear(in_channels, hidden_channels))
            if kernel_size > 1:
                layers.append(NeighborMixing(hidden_channels, kernel_size))
            layers += [nn.LayerNorm(hidden_channels), nn.GELU()]
            in_channels = hidden_channels
        self.layers = nn.Sequential(*layers, nn.Linear(in_channels, num_choices - 1))
        self.init_weights()

    def init_weights(self) -> None:
        """Nearly all regions start fine, where the network is the dense one."""
        last = self.layers[-1]
        trunc_normal_(last.weight, std=0.01)
        each = self.start_ratio / last.out_features
        nn.init.constant_(last.bias, math.log(each / (1 - self.start_ratio)))

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        """Score the scales.

        Args:
            x: What is known of each region, ``(B, Hr, Wr, in_channels)``.
            padding: Regions that are padding, ``(B, Hr, Wr)``, bool; their neighbors do not see
                them.

        Returns:
            From fine to coarse, ``(B, Hr, Wr, K)``, float32. With two scales their softmax is the
            probability of a coarse token that the paper's sigmoid gives.
        """
        with full_precision(x.device):
            x = x.to(weight_dtype(self.layers[0]))
            for layer in self.layers:
                if padding is not None and isinstance(layer, NeighborMixing):
                    x = x.masked_fill(padding[..., None], 0)
                x = layer(x)
            coarse = x.float()
        return torch.cat([torch.zeros_like(coarse[..., :1]), coarse], dim=-1)


def start_of(ratio: float) -> float:
    """A ``start_ratio`` near a share of regions that may be 0 or 1."""
    return min(max(ratio, 0.05), 0.95)


class NeighborMixing(nn.Conv2d):
    """A depth-wise convolution of regions, with a residual.

    Args:
        channels: C.
        kernel_size: In regions, odd.
    """

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, Hr, Wr, C) -> (B, Hr, Wr, C)``."""
        return x + super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
