"""Collects auxiliary losses and statistics that are produced inside a backbone.

A router publishes, and the training loop collects::

    with mmtoken.token_losses() as published:
        task_loss = criterion(model(images), labels)
    (task_loss + published.total()).backward()

Under MMEngine's runner :class:`~mmtoken.engine.TokenLossHook` does this. Nothing is stored on
modules: activation checkpointing would add it twice, and copying the model would fail.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from .torch_private import in_backward

_collector: ContextVar['AuxLossCollector | None'] = ContextVar('mmtoken_aux_losses', default=None)


class AuxLossCollector(Mapping[str, Tensor]):
    """Published values by name; the mean if a name was published several times."""

    def __init__(self) -> None:
        self._published: dict[str, list[Tensor]] = {}

    def add(self, name: str, value: Tensor) -> None:
        """Add a value; statistics are detached, losses are not."""
        value = value if is_loss(name) else value.detach()
        self._published.setdefault(name, []).append(value)

    def total(self) -> Tensor:
        """The sum of the losses, ``()``; 0 if there are none."""
        return sum((self[name] for name in self if is_loss(name)), start=torch.zeros(()))

    def __getitem__(self, name: str) -> Tensor:
        return torch.stack(self._published[name]).mean(0)

    def __iter__(self) -> Iterator[str]:
        return iter(self._published)

    def __len__(self) -> int:
        return len(self._published)


@contextmanager
def token_losses() -> Iterator[AuxLossCollector]:
    """Collect the values published inside this context; nested contexts are independent."""
    collector = AuxLossCollector()
    token = _collector.set(collector)
    try:
        yield collector
    finally:
        _collector.reset(token)


def is_loss(name: str) -> bool:
    """Whether a name denotes a loss: MMEngine sums all values with "loss" in their name."""
    return 'loss' in name


@torch.compiler.disable  # which cannot trace a ContextVar
def should_publish(training: bool) -> bool:
    """Whether a module should compute the values that it publishes.

    Args:
        training: The module's ``training``.

    Returns:
        True in training with gradients, also during checkpoint recomputation, which must repeat the
        forward pass, though :func:`publish` ignores its values. False in a trace.

    Raises:
        RuntimeError: A loss would be published outside of :func:`token_losses`.
    """
    if not training or not torch.is_grad_enabled() or torch.jit.is_tracing():
        return False
    if not in_recompute():
        _require_collector()
    return True


@torch.compiler.disable
def publish(values: Mapping[str, Tensor]) -> None:
    """Add losses and statistics to the collector.

    Values published during checkpoint recomputation or in a trace are ignored, and so are those
    under ``no_grad`` outside of :func:`token_losses`.

    Args:
        values: Scalars ``()`` by name. Those with "loss" in their name are losses, which are
            summed; all others are statistics, which are logged.

    Raises:
        TypeError: A value that is no scalar tensor.
        RuntimeError: Called outside of :func:`token_losses`.
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


@torch.compiler.disable
def is_collecting() -> bool:
    """Whether a loss published now would be trained: with gradients, in :func:`token_losses`.

    For losses that only a training loop of ours asks for. A module that must not lose its loss
    asks :func:`should_publish`.
    """
    has_gradients = torch.is_grad_enabled() and not torch.jit.is_tracing()
    return has_gradients and not in_recompute() and _collector.get() is not None


def in_recompute() -> bool:
    """Whether backward is recomputing the activations of a checkpointed module."""
    return in_backward()


def _require_collector() -> AuxLossCollector:
    collector = _collector.get()
    if collector is None:
        raise RuntimeError(
            'the token losses of this model would be lost. With a config, add '
            "default_hooks = dict(token_losses=dict(type='mmtoken.TokenLossHook')), which leaves "
            'the hooks of your base config in place, while a list custom_hooks would replace '
            'theirs; in your own loop, call the model inside of '
            '`with mmtoken.token_losses() as published:` and add published.total() to the loss'
        )
    return collector
