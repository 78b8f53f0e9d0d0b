"""torch.compile: static networks are one graph, and the breaks of the others are counted."""

import pytest
import torch
from families import FAMILIES
from helpers import needs_tracing
from torch._dynamo.utils import counters

from mmtoken.registry import MODELS

# Where choices become lengths, and where they are recorded or published
MOST_BREAKS = dict(DGEDeiT=9, MSViT=7, MergeViT=2)
SLOW = ('DGEPVT', 'DGEDPVT')  # half a minute each, for blocks as those of DGEDeiT
STATIC = [name for name, family in FAMILIES.items() if not family.chooses]


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def build(name):
    return MODELS.build(dict(type=f'mmtoken.{name}', **FAMILIES[name].small)).eval()


def check(model, compiled, size):
    images = torch.randn(1, 3, *size)
    with torch.no_grad():
        for ours, theirs in zip(model(images), compiled(images), strict=True):
            torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)


@needs_tracing
@pytest.mark.parametrize('name', STATIC)
def test_static_networks_are_one_graph_for_each_size(name):
    model = build(name)
    compiled = torch.compile(model, backend='aot_eager', fullgraph=True)
    check(model, compiled, (64, 96))
    check(model, compiled, (80, 64))
    assert counters['stats']['unique_graphs'] == 2


@needs_tracing
@pytest.mark.parametrize('name', MOST_BREAKS)
def test_breaks_of_networks_that_choose(name):
    model = build(name)
    check(model, torch.compile(model, backend='aot_eager'), (64, 96))
    assert 0 < sum(counters['graph_break'].values()) <= MOST_BREAKS[name]


def test_every_backbone_is_named():
    assert {*STATIC, *MOST_BREAKS, *SLOW} == set(FAMILIES)
