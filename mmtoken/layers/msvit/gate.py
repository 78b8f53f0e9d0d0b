"""The gate that decides which regions of an image deserve fine tokens.

Source: MSViT, arXiv 2307.02321: a four-layer MLP on each coarse region by itself. What it reads and
how wide it is were not published; that is decided here.
"""

import math

import torch
import torch.nn as nn
from timm.layers import trunc_normal_
from torch import Tensor

from ..common.plain import weight_dtype
from ..common.precision import full_precision


class ScaleGate(nn.Module):
    """Scores for the two scales of each region.

    Args:
        in_channels: Channels of what is known of a region.
        hidden_channels: Of the MLP.
        num_layers: Linear layers of the MLP; each but the last is followed by LayerNorm and GELU.
        start_ratio: Share of coarse regions before anything has been learned, in (0, 1).

    Raises:
        ValueError: An argument out of range.
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int = 64,
        num_layers: int = 4,
        start_ratio: float = 0.1,
    ) -> None:
        super().__init__()
        if not 0 < start_ratio < 1:
            raise ValueError(f'start_ratio must be between 0 and 1, got {start_ratio}')
        if num_layers < 1:
            raise ValueError(f'num_layers must be 1 or more, got {num_layers}')
        self.start_ratio = start_ratio
        layers = []
        for _ in range(num_layers - 1):
            layers += [
                nn.Linear(in_channels, hidden_channels), nn.LayerNorm(hidden_channels), nn.GELU(),
            ]  # fmt: skip
            in_channels = hidden_channels
        self.layers = nn.Sequential(*layers, nn.Linear(in_channels, 1))
        self.init_weights()

    def init_weights(self) -> None:
        """Nearly all regions start fine, where the network is the dense one."""
        last = self.layers[-1]
        trunc_normal_(last.weight, std=0.01)
        nn.init.constant_(last.bias, math.log(self.start_ratio / (1 - self.start_ratio)))

    def forward(self, x: Tensor) -> Tensor:
        """``(B, Hr, Wr, in_channels) -> (B, Hr, Wr, 2)``: fine and coarse, float32.

        Their softmax is the probability of a coarse token that the paper's sigmoid gives.
        """
        with full_precision(x.device):
            coarse = self.layers(x.to(weight_dtype(self.layers[0]))).float()
        return torch.cat([torch.zeros_like(coarse), coarse], dim=-1)
