"""How many queries attend within their masks, over the course of a training."""

import torch
from torch import Tensor, nn

from ..runtime.aux_losses import in_recompute


class MaskAnnealing(nn.Module):
    """The share of queries with masked attention, for each block: from 1 to 0, block after block.

    Training has ``num_blocks + 2`` parts of equal length. In the first one all queries have masks;
    in each that follows the share of one more block falls to 0, the first block first; in the last
    part no query has one. Within its part it falls as ``(1 - progress) ** power``.

    Source: EoMT, arXiv 2503.19108, section 3.3, and the schedules of its released configs.

    Args:
        num_blocks: Blocks with masks.
        total_iters: Training passes, usually all iterations of the training. They are counted in
            the buffer ``iterations``, which checkpoints keep.
        power: Of the decay; 0.9 as released.

    Raises:
        ValueError: ``total_iters`` or ``power`` is not positive.
    """

    def __init__(self, num_blocks: int, total_iters: int, power: float = 0.9) -> None:
        super().__init__()
        for name, value in dict(total_iters=total_iters, power=power).items():
            if not value > 0:
                raise ValueError(f'annealing: {name} must be above 0, got {value}')
        self.num_blocks = num_blocks
        self.total_iters = total_iters
        self.power = power
        self.register_buffer('iterations', torch.zeros((), dtype=torch.int64))

    def advance(self) -> list[float]:
        """The share of each block now; a training pass advances it."""
        shares = self.shares(self.iterations).tolist()
        if torch.is_grad_enabled() and not in_recompute():
            self.iterations += 1
        return shares

    def shares(self, iterations: Tensor) -> Tensor:
        """The share of each block after so many passes: ``(num_blocks,)``."""
        part = iterations / self.total_iters * (self.num_blocks + 2)
        started = torch.arange(1, self.num_blocks + 1, device=part.device)
        return (1 - (part - started).clamp(0, 1)) ** self.power
