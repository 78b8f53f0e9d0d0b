"""From one token grid to the next: fewer tokens, more channels.

Source: PSViT, arXiv 2108.03428, which pools tokens between stages; how is our reading, see
:class:`TokenPooling`.
"""

from typing import Literal, get_args

import torch.nn as nn
from torch import Tensor

Pooling = Literal['max', 'mean', 'conv']


class TokenPooling(nn.Module):
    """A convolution that widens the tokens, and a pooling that halves their grid.

    Args:
        in_channels: Channels of a token before.
        out_channels: Channels of a token after.
        pooling: ``'max'`` or ``'mean'`` of 3 x 3 tokens around every other one, those of the grid
            alone at its border; ``'conv'``, a stride in the convolution instead.
        kernel_size: Of the convolution, 3 or 1.

    Raises:
        ValueError: An unknown pooling or kernel, or a strided convolution that would skip tokens.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        pooling: Pooling = 'max',
        kernel_size: int = 3,
    ) -> None:
        super().__init__()
        if pooling not in get_args(Pooling):
            raise ValueError(f'pooling must be one of {get_args(Pooling)}, got {pooling!r}')
        if kernel_size not in (1, 3):
            raise ValueError(f'pool_kernel must be 1 or 3, got {kernel_size}')
        if pooling == 'conv' and kernel_size == 1:
            raise ValueError("pooling='conv' would skip three of four tokens with pool_kernel=1")
        self.proj = nn.Conv2d(
            in_channels, out_channels, kernel_size, 1 + (pooling == 'conv'), kernel_size // 2
        )
        if pooling == 'max':
            self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        elif pooling == 'mean':
            self.pool = nn.AvgPool2d(3, stride=2, padding=1, count_include_pad=False)
        else:
            self.pool = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """``(B, H, W, in_channels) -> (B, ceil(H / 2), ceil(W / 2), out_channels)``."""
        x = self.pool(self.proj(x.permute(0, 3, 1, 2)))
        return x.permute(0, 2, 3, 1).contiguous()
