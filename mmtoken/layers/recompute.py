"""Activations that are made again in backward instead of kept."""

from collections.abc import Callable

import torch
from torch.utils.checkpoint import checkpoint


def run_block(function: Callable, *args, recompute: bool):
    """Call ``function``; with ``recompute`` its activations are made again in backward."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(function, *args, use_reentrant=False)
    return function(*args)
