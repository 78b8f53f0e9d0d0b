"""Activations that are made again in backward instead of kept."""

from collections.abc import Callable

import torch
from torch.utils.checkpoint import checkpoint


def run_block(function: Callable, *args, recompute: bool):
    """Call ``function``; with ``recompute`` its activations are made again in backward.

    A trace has no backward of its own.
    """
    if recompute and torch.is_grad_enabled() and not torch.jit.is_tracing():
        return checkpoint(function, *args, use_reentrant=False)
    return function(*args)
