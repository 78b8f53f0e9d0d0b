"""Where the losses and statistics go that are born inside a backbone.

A router publishes, and whoever computes the loss collects::

    with mmtoken.token_losses() as published:
        task_loss = criterion(model(images), labels)
    (task_loss + published.total()).backward()

Under MMEngine's runner :class:`~mmtoken.engine.TokenLossHook` does this. Nothing is stored on
modules, where recomputation of activations would add it twice and a copy of the model fail.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_collector: ContextVar['AuxLossCollector | None'] = ContextVar('mmtoken_aux_losses', default=None)


class AuxLossCollector(Mapping[str, Tensor]):
    """What was published, by name; the mean if a name came several times, as with two views."""

    def __init__(self) -> None:
        self._published: dict[str, list[Tensor]] = {}

    def add(self, name: str, value: Tensor) -> None:
        """Take one value more; all but losses lose their graph."""
        value = value if is_loss(name) else value.detach()
        self._published.setdefault(name, []).append(value)

    def total(self) -> Tensor:
        """The sum of the losses, 0 without any; ``()``."""
        return sum((self[name] for name in self if is_loss(name)), start=torch.zeros(()))

    def __getitem__(self, name: str) -> Tensor:
        return torch.stack(self._published[name]).mean(0)

    def __iter__(self) -> Iterator[str]:
        return iter(self._published)

    def __len__(self) -> int:
        return len(self._published)


@contextmanager
def token_losses() -> Iterator[AuxLossCollector]:
    """Collect what modules publish inside this context; of nested ones the innermost does."""
    collector = AuxLossCollector()
    token = _collector.set(collector)
    try:
        yield collector
    finally:
        _collector.reset(token)


def is_loss(name: str) -> bool:
    """Whether a name is that of a loss: MMEngine sums every value with "loss" in its name."""
    return 'loss' in name


@torch.compiler.disable  # which cannot trace a ContextVar
def should_publish(training: bool) -> bool:
    """Whether a module should compute what it publishes.

    Args:
        training: The module's ``training``.

    Returns:
        True in training with gradients, also while backward makes activations again: it must do
        the same as the forward pass did, though :func:`publish` drops the result. False in a trace,
        which trains nothing.

    Raises:
        RuntimeError: It should, but nobody collects.
    """
    if not training or not torch.is_grad_enabled() or torch.jit.is_tracing():
        return False
    if not in_recompute():
        _require_collector()
    return True


@torch.compiler.disable
def publish(values: Mapping[str, Tensor]) -> None:
    """Give losses and statistics to the open sink.

    Dropped are those that backward gives again as it recomputes activations, those of a trace, and,
    if nobody collects, those made under ``no_grad``.

    Args:
        values: Scalars ``()`` by name. Those with "loss" in their name are losses, which are added
            up; all others are statistics, which are only logged and detached here.

    Raises:
        TypeError: A value that is no scalar tensor.
        RuntimeError: Nobody collects.
    """
    if (
        in_recompute()
        or torch.jit.is_tracing()
        or not (_collector.get() is not None or torch.is_grad_enabled())
    ):
        return
    collector = _require_collector()
    for name, value in values.items():
        if not isinstance(value, Tensor) or value.ndim:
            given = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f'{name!r} must be a tensor of shape (), got {given}')
        collector.add(name, value)


def in_recompute() -> bool:
    """Whether backward is running and makes activations again, of a checkpointed module."""
    return torch._C._current_graph_task_id() != -1  # the backward that this thread works on


def _require_collector() -> AuxLossCollector:
    collector = _collector.get()
    if collector is None:
        raise RuntimeError(
            'the losses that this model makes of its tokens would be lost. With a config, add '
            "default_hooks = dict(token_losses=dict(type='mmtoken.TokenLossHook')), which leaves "
            'the hooks of your base config in place, while a list custom_hooks would replace '
            'theirs; in a loop of your own, call the model inside of '
            '`with mmtoken.token_losses() as published:` and add published.total() to the loss'
        )
    return collector
