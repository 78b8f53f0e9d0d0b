"""Index tables and masks that depend on shapes alone: made once per shape, on demand."""

from collections.abc import Callable
from functools import lru_cache, wraps

import torch

from .tracing import as_numbers, untraced

MAX_PLANS = 64


def cached_plan(function: Callable) -> Callable:
    """Keep the last :data:`MAX_PLANS` results of a function of hashable arguments.

    Results are shared and must not be written to. They are made outside inference mode, for
    autograd cannot save tensors that were made in it; on a CPU, whatever the default device of the
    moment; outside graphs of ``torch.compile``, which could not trace how many tokens lie where;
    and outside traces, where they are constants.
    """

    @lru_cache(maxsize=MAX_PLANS)
    @wraps(function)
    def plan(*args, **kwargs):
        with torch.inference_mode(False), torch.device('cpu'), untraced():
            return function(*args, **kwargs)

    @torch.compiler.disable
    @wraps(function)
    def eager(*args, **kwargs):
        if torch.jit.is_tracing():
            args = as_numbers(args)
            kwargs = {name: as_numbers(value) for name, value in kwargs.items()}
        return plan(*args, **kwargs)

    eager.cache_info, eager.cache_clear = plan.cache_info, plan.cache_clear
    return eager
