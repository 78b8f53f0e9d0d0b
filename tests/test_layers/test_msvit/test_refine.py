import torch
import torch.nn.functional as F
from helpers import randomize
from torch import nn

from mmtoken.layers.msvit.refine import CoarseRefine


def awake(channels=8):
    return randomize(CoarseRefine(channels), std=0.5)


def flags(*places, grid=(6, 9)):
    coarse = torch.zeros(1, 1, *grid)
    for row, column in places:
        coarse[..., row, column] = 1
    return coarse


def test_starts_as_the_identity():
    x, coarse = torch.randn(2, 8, 5, 7), torch.randint(2, (2, 1, 5, 7)).float()
    layer = CoarseRefine(8)
    assert torch.equal(layer(x, coarse), x)
    layer = awake()
    assert not torch.allclose(layer(x, coarse), x)
    layer.init_weights()
    assert torch.equal(layer(x, coarse), x)


def test_sees_flags_next_to_a_place():
    layer, x = awake(), torch.randn(1, 8, 6, 9)
    changed = (layer(x, flags((2, 4))) != layer(x, flags())).any(dim=1)[0]
    near = torch.zeros(6, 9, dtype=torch.bool)
    near[1:4, 3:6] = True
    assert torch.equal(changed, near)


def test_what_a_flag_changes_depends_on_the_map():
    layer = awake()
    changes = [
        layer(x, flags((2, 4))) - layer(x, flags()) for x in torch.randn(2, 1, 8, 6, 9).unbind()
    ]
    assert not torch.allclose(*changes, atol=1e-2)


def test_can_smooth_coarse_places_alone():
    """With the right weights, coarse places take the mean around them and fine ones stay."""
    layer, x = CoarseRefine(4), torch.randn(1, 4, 6, 8)
    coarse = F.interpolate(torch.randint(2, (1, 1, 3, 4)).float(), scale_factor=2)
    layer.norm = nn.Identity()
    with torch.no_grad():
        for conv in (layer.look, layer.flag):
            conv.weight.zero_()
        layer.look.weight += 1 / 9
        layer.look.weight[:, :, 1, 1] -= 1
        layer.look.bias.fill_(-50)
        layer.flag.weight[:, :, 1, 1] = 100
        layer.proj.weight[:, :, 0, 0] = torch.eye(4)
        layer.proj.bias.zero_()
        out = layer(x, coarse) - 50 * coarse
    smooth = F.avg_pool2d(x, 3, 1, padding=1)
    torch.testing.assert_close(out, torch.where(coarse > 0, smooth, x), atol=1e-4, rtol=1e-4)


def test_every_parameter_learns_after_the_first_step():
    layer, x = CoarseRefine(8), torch.randn(2, 8, 5, 7)
    coarse, target = torch.randint(2, (2, 1, 5, 7)).float(), torch.randn(2, 8, 5, 7)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for step in range(2):
        optimizer.zero_grad(set_to_none=True)
        (layer(x, coarse) * target).mean().backward()
        for name, parameter in layer.named_parameters():
            assert parameter.grad is not None, name
            assert step == 0 or parameter.grad.abs().sum() > 0, name
        optimizer.step()
