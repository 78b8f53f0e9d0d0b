import pytest
import torch

from mmtoken.losses.map_distance import DISTANCES, map_distance

MAPS = torch.arange(2 * 3 * 2 * 4, dtype=torch.float32).view(2, 3, 2, 4).sin()
WANTED = (MAPS * 2.7).cos()


def normalized(features):
    """The definition, for the features of one position: ``(C,)``."""
    return (features - features.mean()) / (features.var(correction=0) + 1e-5).sqrt()


REFERENCES = dict(
    mse=lambda a, b: (normalized(a) - normalized(b)).square().mean().item(),
    cosine=lambda a, b: 1 - (a @ b / (a.norm() * b.norm())).item(),
)


@pytest.mark.parametrize('distance', DISTANCES)
@pytest.mark.parametrize('sizes', [None, [(2, 4), (1, 3)]])
def test_mean_over_the_positions_of_images(distance, sizes):
    given = None if sizes is None else torch.tensor(sizes)
    loss = map_distance(MAPS, WANTED, given, distance)
    places = [
        REFERENCES[distance](MAPS[i, :, y, x], WANTED[i, :, y, x])
        for i, (height, width) in enumerate(sizes or [(2, 4)] * 2)
        for y in range(height)
        for x in range(width)
    ]
    assert loss.shape == () and loss.dtype == torch.float32
    assert loss.item() == pytest.approx(sum(places) / len(places), rel=1e-4)


@pytest.mark.parametrize('distance', DISTANCES)
def test_padding_has_no_gradient_and_equal_maps_no_distance(distance):
    maps = MAPS.clone().requires_grad_()
    map_distance(maps, WANTED, torch.tensor([(2, 4), (1, 3)]), distance).backward()
    assert not maps.grad[1, :, 1].any() and not maps.grad[1, :, :, 3].any()
    assert maps.grad[0].abs().amin() > 0
    assert map_distance(MAPS, MAPS * 3, distance=distance).abs() < 1e-4


@pytest.mark.parametrize('distance', DISTANCES)
def test_float32_under_autocast(distance):
    plain = map_distance(MAPS, WANTED, distance=distance)
    with torch.autocast('cpu', torch.bfloat16):
        assert map_distance(MAPS, WANTED, distance=distance) == plain
        half = map_distance(MAPS.bfloat16(), WANTED.bfloat16(), distance=distance)
    assert half.dtype == torch.float32 and half.item() == pytest.approx(plain.item(), rel=0.05)
