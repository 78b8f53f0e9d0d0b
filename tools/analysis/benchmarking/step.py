"""A forward pass or a training step of a network, as a function without arguments."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from mmtoken import token_losses

from .graph import capture
from .targets import BenchmarkTarget


@dataclass(frozen=True)
class Setting:
    """How networks are run.

    Attributes:
        shape: Height and width of the images.
        batch_size: Images in a batch.
        device: CPU or CUDA device.
        dtype: Precision.
        train: Training steps instead of forward passes.
        compiled: Through ``torch.compile``.
        captured: Forward passes are replays of a CUDA graph, for networks that read nothing back.
        threads: Of torch, on the CPU.
    """

    shape: tuple[int, int]
    batch_size: int = 1
    device: torch.device = torch.device('cpu')
    dtype: torch.dtype = torch.float32
    train: bool = False
    compiled: bool = False
    captured: bool = False
    threads: int = 1


def make_images(target: BenchmarkTarget, setting: Setting) -> Tensor:
    """Noise, the same in every call: ``(B, C, H, W)``."""
    generator = torch.Generator().manual_seed(0)
    size = (setting.batch_size, target.in_channels, *setting.shape)
    return torch.randn(size, generator=generator).to(setting.device, setting.dtype)


def make_step(target: BenchmarkTarget, network: nn.Module, setting: Setting) -> Callable[[], None]:
    """A function that runs the network once on :func:`make_images`.

    A forward pass runs in eval mode without autograd, with weights in the precision of the images.
    A training step is a forward pass, backward from the mean squares of all outputs and the losses
    that routers publish, and the release of gradients, without an optimizer. It keeps weights in
    float32 under autocast, as MMEngine's ``AmpOptimWrapper`` does.

    Args:
        target: What the network was built from.
        network: On the device of the setting; it is changed in place.
        setting: How to run it.
    """
    images = make_images(target, setting)
    network.train(setting.train)
    if not setting.train:
        network.to(setting.dtype)
    run = torch.compile(network) if setting.compiled else network
    half = setting.dtype != torch.float32
    autocast = partial(
        torch.autocast,
        setting.device.type,
        dtype=setting.dtype if half else None,
        enabled=half and (setting.train or target.needs_autocast),
    )
    override = target.replay()
    # Compiled modules that hold tensors or arrays of their own fail their guards in inference mode.
    without_grad = torch.no_grad if setting.compiled else torch.inference_mode

    def forward() -> None:
        with without_grad(), autocast(), override():
            run(images)

    def train_step() -> None:
        with autocast(), override(), token_losses() as published:
            outputs = run(images)
        loss = sum(output.float().square().mean() for output in _differentiable(outputs))
        (loss + published.total()).backward()
        network.zero_grad(set_to_none=True)

    if setting.train:
        return train_step
    return capture(forward) if setting.captured else forward


def _differentiable(outputs) -> Iterator[Tensor]:
    """All tensors with gradients in nested outputs."""
    if isinstance(outputs, Tensor) and outputs.requires_grad:
        yield outputs
    elif isinstance(outputs, Mapping):
        outputs = list(outputs.values())
    if isinstance(outputs, (list, tuple)):
        for output in outputs:
            yield from _differentiable(output)
