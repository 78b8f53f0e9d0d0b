"""The depth-wise convolution and its gradients."""

import copy

import pytest
import torch
import torch.nn as nn

from mmtoken.layers.swat import depthwise
from mmtoken.layers.swat.depthwise import depthwise_conv, has_slow_gradient
from mmtoken.runtime.reference import reference_path


def make_conv(channels, kernel_size, bias=True):
    return nn.Conv2d(
        channels, channels, kernel_size, padding=kernel_size // 2, groups=channels, bias=bias
    )


def make_x(batch=2, channels=6, height=5, width=7, **kwargs):
    return torch.randn(batch, height, width, channels, **kwargs).permute(0, 3, 1, 2)


@pytest.mark.parametrize('kernel_size', [5, 7, 9])
@pytest.mark.parametrize('size', [(1, 9), (2, 10), (12, 11)])
@pytest.mark.parametrize('bias', [True, False])
def test_output_and_gradients_are_those_of_torch(kernel_size, size, bias):
    torch.manual_seed(0)
    conv = make_conv(6, kernel_size, bias)
    other, x = copy.deepcopy(conv), make_x(2, 6, *size).requires_grad_()
    x_other = x.detach().clone().requires_grad_()
    weights = torch.randn(2, 6, *size)
    assert has_slow_gradient(conv, x)
    out = depthwise_conv(conv, x)
    with reference_path():
        expected = depthwise_conv(other, x_other)
    assert torch.equal(out, expected)
    for result in (out, expected):
        (result * weights).sum().backward()
    torch.testing.assert_close(x.grad, x_other.grad)
    torch.testing.assert_close(conv.weight.grad, other.weight.grad, atol=1e-5, rtol=1e-5)
    if bias:
        torch.testing.assert_close(conv.bias.grad, other.bias.grad, atol=1e-5, rtol=1e-5)


def test_gradient_of_a_gradient():
    torch.manual_seed(0)
    conv, x = make_conv(3, 5), make_x(1, 3, 4, 4, dtype=torch.double).requires_grad_()
    conv.double()
    arguments = (x, conv.weight, conv.bias)
    assert torch.autograd.gradgradcheck(depthwise._SplitGradientConv.apply, arguments)


def test_frozen_parts_get_no_gradient():
    conv, x = make_conv(4, 5), make_x(channels=4)
    conv.bias.requires_grad_(False)
    depthwise_conv(conv, x).sum().backward()
    assert conv.bias.grad is None and x.grad is None and conv.weight.grad is not None


def narrow(conv):
    return make_conv(6, 3)


def frozen(conv):
    return conv.requires_grad_(False)


def dilated(conv):
    conv.dilation, conv.padding = (2, 2), (4, 4)
    return conv


def half(conv):
    return conv.to(torch.bfloat16)


def hooked(conv):
    conv.register_forward_hook(lambda *_: None)
    return conv


def test_narrow_maps():
    conv, x = make_conv(6, 9), make_x(width=7).requires_grad_()
    assert not has_slow_gradient(conv, x)
    depthwise_conv(conv, x).sum().backward()


@pytest.mark.parametrize('change', [narrow, frozen, dilated, half, hooked])
def test_torch_computes_everything_else(change):
    conv = change(make_conv(6, 5))
    x = make_x(dtype=conv.weight.dtype)
    assert not has_slow_gradient(conv, x)
    assert torch.equal(depthwise_conv(conv, x), conv(x))


def test_without_gradients_torch_computes():
    conv, x = make_conv(6, 5), make_x()
    with torch.no_grad():
        assert not has_slow_gradient(conv, x)


def test_under_autocast():
    conv, x = make_conv(6, 5), make_x().requires_grad_()
    with torch.autocast('cpu', torch.bfloat16):
        depthwise_conv(conv, x).sum().backward()
    assert x.grad.dtype == conv.weight.grad.dtype == torch.float32
