"""Gradients of whole networks, against differences of their values in float64."""

import pytest
import torch
from families import FAMILIES
from helpers import wake

from mmtoken.layers.dge import deformable
from mmtoken.registry import MODELS

STEP = 1e-6
NETWORKS = [
    pytest.param(name, args, id=name + form)
    for name, family in FAMILIES.items()
    for form, args in family.networks.items()
]


@pytest.mark.parametrize('name, args', NETWORKS)
def test_gradients(name, args, monkeypatch):
    """Along a random direction of images and parameters, so near that no choice changes."""
    monkeypatch.setattr(deformable, 'OFFSET_GRADIENT', 1.0)  # offsets learn a tenth as fast
    torch.manual_seed(0)
    model = wake(MODELS.build(dict(type=f'mmtoken.{name}', **args))).double().eval()
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64, requires_grad=True)
    values = [images, *(p for p in model.parameters() if p.requires_grad)]
    directions = [torch.randn_like(value) for value in values]
    weights = [torch.randn_like(x) for x in model(images)]

    def loss():
        return sum((x * w).sum() for x, w in zip(model(images), weights, strict=True))

    def moved(step):
        with torch.no_grad():
            for value, direction in zip(values, directions, strict=True):
                value.add_(direction, alpha=step)
            result = loss()
            for value, direction in zip(values, directions, strict=True):
                value.sub_(direction, alpha=step)
        return result

    gradients = torch.autograd.grad(loss(), values, allow_unused=True)
    assert gradients[0] is not None
    slope = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True) if g is not None)
    torch.testing.assert_close(
        slope, (moved(STEP) - moved(-STEP)) / (2 * STEP), rtol=1e-4, atol=1e-4
    )
