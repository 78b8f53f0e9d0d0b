"""Paths that only a GPU takes, without one: shapes, dtypes, devices, and which operators run."""

import pytest
import torch
from fake_cuda import call_on_cuda, fake_cuda
from families import FAMILIES
from mmengine.registry import MODELS

# Attention that is not fused
PRODUCTS = {'matmul', '__matmul__', 'bmm', 'baddbmm', 'einsum', 'mm'}
CASES = [
    pytest.param(dict(type=f'mmtoken.{name}', **kwargs), id=f'{name}{form}')
    for name, family in FAMILIES.items()
    if not family.chooses
    for form, kwargs in family.networks.items()
]


@pytest.mark.parametrize('cfg', CASES)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_forward(cfg, dtype, monkeypatch):
    model, images = MODELS.build(cfg).eval(), torch.randn(2, 3, 72, 104)
    with torch.no_grad():
        expected = model(images)
    with fake_cuda(monkeypatch) as mode:
        maps, calls, on_cpu = call_on_cuda(mode, model, images, dtype)
    assert [map_.shape for map_ in maps] == [map_.shape for map_ in expected]
    assert all(map_.dtype == dtype and map_.device.type == 'cuda' for map_ in maps)
    assert not on_cpu.total(), +on_cpu
    assert calls['scaled_dot_product_attention'] and not PRODUCTS & calls.keys()


def test_tensors_left_on_the_cpu_are_found(monkeypatch):
    class Forgetful(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) + torch.ones(1, 1).sum().to(x.device)

    with fake_cuda(monkeypatch) as mode:
        _, calls, on_cpu = call_on_cuda(mode, Forgetful(2, 2), torch.ones(1, 2), torch.float32)
    assert on_cpu['aten.ones.default'] == on_cpu['aten.sum.default'] == 1
    assert calls['linear'] == 1


def test_networks_that_choose_by_the_image_refuse(monkeypatch):
    model = MODELS.build(dict(type='mmtoken.MSViT', **FAMILIES['MSViT'].small)).eval()
    with fake_cuda(monkeypatch) as mode, pytest.raises(RuntimeError, match='has no values here'):
        call_on_cuda(mode, model, torch.randn(2, 3, 72, 104), torch.float32)
