"""Several threads, each with its network and sizes, compute what one thread does."""

from concurrent.futures import ThreadPoolExecutor

import torch
from families import FAMILIES

from mmtoken.layers.common.cache import PLANS
from mmtoken.registry import MODELS

SIZES = [(64, 96), (33, 50), (80, 64), (7, 130), (64, 96), (48, 48)]


def build(name):
    torch.manual_seed(0)
    return MODELS.build(dict(type=f'mmtoken.{name}', **FAMILIES[name].small)).eval()


def serve(model, seed):
    """Maps of a series of images, which is another one for each seed."""
    generator = torch.Generator().manual_seed(seed)
    sizes = SIZES[seed % len(SIZES) :] + SIZES[: seed % len(SIZES)]
    with torch.inference_mode():
        return [model(torch.randn(1, 3, *size, generator=generator)) for size in sizes]


def check(models):
    """Requests in threads of their own are equal, bit for bit, to the same ones in turn."""
    alone = [serve(model, seed) for seed, model in enumerate(models)]
    PLANS.clear()  # threads make the same plans at the same time
    with ThreadPoolExecutor(len(models)) as pool:
        together = list(pool.map(serve, models, range(len(models))))
    for expected, found in zip(alone, together, strict=True):
        for maps, others in zip(expected, found, strict=True):
            assert all(map(torch.equal, maps, others))


def test_a_network_for_each_thread():
    check([build(name) for name in FAMILIES])


def test_networks_that_threads_share():
    for name in ('STViTRSwin', 'DGEPVT', 'MSViT'):
        check([build(name)] * 4)
