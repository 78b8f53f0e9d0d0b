"""One forward pass or one training step of a network, as a function without arguments."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from ..runtime.aux_losses import token_losses


def make_images(
    batch_size: int,
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    channels: int = 3,
) -> Tensor:
    """Noise, the same at every call: ``(batch_size, channels, *shape)``."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch_size, channels, *shape, generator=generator).to(device, dtype)


def make_step(
    network: nn.Module,
    images: Tensor,
    train: bool = False,
    compiled: bool = False,
    mixed: bool = False,
    inside: Callable[[], AbstractContextManager] = nullcontext,
) -> Callable[[], None]:
    """A function that runs the network once.

    A forward pass runs in eval mode and without autograd, with weights in the precision of the
    images. A training step is forward, backward from the mean squares of all outputs and the
    losses that routers publish, and the release of gradients; no optimiser. It keeps weights in
    float32 and casts as it goes, as MMEngine's ``AmpOptimWrapper`` does.

    Args:
        network: A network on the device of the images; it is changed in place.
        images: ``(B, C, H, W)``.
        train: A training step instead of a forward pass.
        compiled: Through ``torch.compile``.
        mixed: Run forward passes in automatic mixed precision too, for networks that make float32
            tensors of their own.
        inside: Makes a context that each run is inside of.
    """
    network.train(train)
    if not train:
        network.to(images.dtype)
    run = torch.compile(network) if compiled else network
    half = images.dtype != torch.float32
    casting = partial(
        torch.autocast,
        images.device.type,
        dtype=images.dtype if half else None,
        enabled=half and (train or mixed),
    )

    # Compiled modules that hold tensors or arrays of their own fail their guards in inference mode.
    without_grad = torch.no_grad if compiled else torch.inference_mode

    def forward() -> None:
        with without_grad(), casting(), inside():
            run(images)

    def train_step() -> None:
        with casting(), inside(), token_losses() as published:
            outputs = run(images)
        loss = sum(output.float().square().mean() for output in _floats(outputs))
        (loss + published.total()).backward()
        network.zero_grad(set_to_none=True)

    return train_step if train else forward


def _floats(outputs) -> Iterator[Tensor]:
    """All tensors with gradients inside nested outputs."""
    if isinstance(outputs, Tensor) and outputs.requires_grad:
        yield outputs
    elif isinstance(outputs, Mapping):
        outputs = list(outputs.values())
    if isinstance(outputs, (list, tuple)):
        for output in outputs:
            yield from _floats(output)
