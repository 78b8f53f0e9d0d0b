"""Images that nobody would train with: any size, any layout in memory, extreme values."""

import math

import pytest
import torch
from families import FAMILIES
from helpers import TORCH_2_1, wake
from hypothesis import given, settings
from hypothesis import strategies as st

import mmtoken
from mmtoken.registry import MODELS

each = pytest.mark.parametrize('name', FAMILIES)


def build(name, **kwargs):
    torch.manual_seed(0)
    args = {**FAMILIES[name].small, **kwargs}
    return wake(MODELS.build(dict(type=f'mmtoken.{name}', **args)))


def train(model, images):
    """Losses and gradients of a training pass."""
    with mmtoken.token_losses() as published:
        maps = model.train()(images)
        loss = sum(x.float().square().mean() for x in maps) + published.total()
    loss.backward()
    return loss, [p.grad for p in model.parameters() if p.grad is not None]


@each
@settings(deadline=None, max_examples=12)
@given(data=st.data())
def test_any_batch_of_any_size(name, data):
    short, long = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 300))
    size = data.draw(st.permutations([short, long]))
    model = build(name)
    stages = range(len(model.out_channels))
    indices = data.draw(st.lists(st.sampled_from(stages), min_size=1, unique=True).map(sorted))
    model = build(name, out_indices=[model.out_indices[i] for i in indices])
    images = torch.randn(data.draw(st.integers(1, 3)), 3, *size, requires_grad=True)
    with torch.no_grad():
        maps = model.eval()(images)
    strides, channels = model.feature_info.reduction(), model.feature_info.channels()
    for found, stride, width in zip(maps, strides, channels, strict=True):
        sides = [math.ceil(side / stride) for side in size]
        assert list(found.shape) == [len(images), width, *sides] and found.isfinite().all()
    if len(images) == 1 and max(size) <= 4:
        return  # one place, of which the batch norm of a stem has no statistics
    loss, grads = train(model, images)
    assert loss.isfinite() and all(g.isfinite().all() for g in [*grads, images.grad])


@each
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('scale', [0.0, 1.0, 1e4])
def test_half_precision_has_no_nan(name, dtype, scale):
    """All-zero images too, which are padding alone."""
    if TORCH_2_1 and dtype == torch.float16:
        pytest.skip('the CPU of torch 2.1 has no autocast to float16')
    model, images = build(name), scale * torch.randn(2, 3, 70, 100)
    with torch.autocast('cpu', dtype):
        loss, grads = train(model, images)
        with torch.no_grad():
            maps = model.eval()(images)
    assert loss.isfinite() and not any(g.isnan().any() for g in grads)
    assert not any(x.isnan().any() for x in maps)


@each
@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_bad_pixels_stay_in_their_image(name, value):
    model, images = build(name).eval(), torch.randn(3, 3, 64, 96)
    images[1, 0, 10, 20] = value
    with torch.no_grad():
        maps = model(images)
        alone = model(images[[0, 2]])
    for found, wanted in zip(maps, alone, strict=True):
        torch.testing.assert_close(found[[0, 2]], wanted, atol=1e-4, rtol=1e-4)


@each
def test_layouts_in_memory_are_equal(name):
    model, images = build(name).eval(), torch.randn(2, 3, 72, 104)
    large = torch.zeros(2, 3, 72, 208)
    large[..., ::2] = images
    with torch.no_grad():
        wanted = model(images)
        for form in (
            images.to(memory_format=torch.channels_last),
            large[..., ::2],
            images.flip(0).flip(0),
            images.expand(2, 3, 72, 104),
        ):
            torch.testing.assert_close(model(form), wanted, atol=1e-4, rtol=1e-4)


@each
def test_double_precision(name):
    """The whole network in float64, choices included."""
    model, images = build(name).eval(), torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        single = model(images)
        double = model.double()(images.double())
    for found, wanted in zip(double, single, strict=True):
        assert found.dtype == torch.float64
        torch.testing.assert_close(found.float(), wanted, atol=1e-3, rtol=1e-3)


@each
@pytest.mark.parametrize('dtype', [torch.uint8, torch.float64])
def test_other_types_are_an_error(name, dtype):
    """Which the data preprocessor would have made float32."""
    with pytest.raises((RuntimeError, TypeError), match='type|dtype|Byte|Double'):
        build(name).eval()(torch.zeros(1, 3, 64, 64, dtype=dtype))
