"""Costs of networks, and the size of images at which a twin costs as much as its network."""

from bisect import bisect_left
from collections.abc import Callable
from functools import cache

import torch
from benchmarking.step import Setting, make_images
from benchmarking.targets import BenchmarkTarget, dense_target

from .networks import NETWORKS

STEP = 32  # pixels
Shape = tuple[int, int]


@cache
def compare_costs(name: str, size: str, shape: Shape, device: torch.device) -> dict[str, dict]:
    """Multiply-accumulates per image of a network, its twin, and its twin on smaller images.

    Args:
        name, size: Of the network.
        shape: Height and width of the images.
        device: Where they are counted.

    Returns:
        ``{'sparse': {'macs': ..., 'shape': [H, W]}, 'twin': ..., 'lower': ...}``; no ``'lower'`` if
        the network costs no less than its twin.
    """
    sparse = NETWORKS[name].target(size)
    macs, twin_macs = (_counter(t, device) for t in (sparse, dense_target(sparse)))
    costs = dict(sparse=(macs(shape), shape), twin=(twin_macs(shape), shape))
    if macs(shape) < twin_macs(shape):
        lower = equal_cost_shape(twin_macs, macs(shape), shape)
        costs['lower'] = twin_macs(lower), lower
    return {name: dict(macs=macs, shape=list(shape)) for name, (macs, shape) in costs.items()}


def _counter(target: BenchmarkTarget, device: torch.device) -> Callable[[Shape], int]:
    network = target.build().to(device)

    @cache
    def macs(shape: Shape) -> int:
        images = make_images(target, Setting(shape, device=device))
        return target.measure_cost(network, images).macs

    return macs


def equal_cost_shape(cost: Callable[[Shape], int], wanted: int, shape: Shape) -> Shape:
    """The size whose cost is nearest to the wanted one, in the proportions of a given size.

    Args:
        cost: Of a network by height and width of its images; it rises with them.
        wanted: The cost to come near to.
        shape: Height and width, in pixels.

    Returns:
        Height and width, multiples of 32, at most ``shape``.
    """
    height, width = shape
    heights = range(STEP, height + 1, STEP)
    shapes = [(h, max(STEP, round(h * width / height / STEP) * STEP)) for h in heights]
    place = bisect_left(shapes, wanted, key=cost)
    return min(shapes[max(0, place - 1) : place + 1], key=lambda s: abs(cost(s) - wanted))
