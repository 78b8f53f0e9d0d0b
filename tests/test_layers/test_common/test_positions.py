import pytest
import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed

from mmtoken.layers.common.positions import resample

GRIDS = [
    ((14, 14), (50, 84)),
    ((14, 14), (7, 3)),
    ((5, 8), (8, 5)),
    ((1, 1), (3, 2)),
    ((6, 4), (1, 1)),
]


@pytest.fixture(params=[False, True], ids=['fast', 'deterministic'])
def deterministic(request):
    torch.use_deterministic_algorithms(request.param)
    yield request.param
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize('old, new', GRIDS)
def test_bicubic_is_that_of_timm(old, new, deterministic):
    embedding = torch.randn(1, old[0] * old[1], 6)
    expected = resample_abs_pos_embed(embedding, new, old, num_prefix_tokens=0)
    ours = resample(embedding, old, new, 'bicubic', True)
    torch.testing.assert_close(ours.flatten(1, 2), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize('old, new', GRIDS)
@pytest.mark.parametrize('antialias', [False, True])
def test_bilinear_is_that_of_torch(old, new, antialias, deterministic):
    embedding = torch.randn(1, old[0] * old[1], 6)
    maps = embedding.unflatten(1, old).permute(0, 3, 1, 2)
    expected = F.interpolate(maps, size=new, mode='bilinear', antialias=antialias)
    ours = resample(embedding, old, new, 'bilinear', antialias).permute(0, 3, 1, 2)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


def test_gradients_agree():
    embedding = torch.randn(1, 35, 4, requires_grad=True)
    grads = []
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        out = resample(embedding, (5, 7), (8, 3), 'bicubic', True)
        grads += torch.autograd.grad(out.sin().sum(), embedding)
    torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(*grads, atol=1e-5, rtol=0)


def test_the_same_grid_is_left_alone(deterministic):
    embedding = torch.randn(1, 12, 5)
    same = resample(embedding, (3, 4), (3, 4), 'bicubic', True)
    assert torch.equal(same, embedding.view(1, 3, 4, 5))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_types_are_kept(dtype, deterministic):
    embedding = torch.randn(1, 12, 5, dtype=dtype)
    with torch.autocast('cpu', torch.bfloat16):
        out = resample(embedding, (3, 4), (6, 7), 'bicubic', True)
    assert out.dtype == dtype
    expected = resample(embedding.float(), (3, 4), (6, 7), 'bicubic', True).to(dtype)
    atol = 1e-6 if dtype == torch.float64 else 1e-2
    torch.testing.assert_close(out, expected, atol=atol, rtol=0)
