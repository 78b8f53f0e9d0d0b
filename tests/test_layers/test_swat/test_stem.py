"""The stem of structure-aware tokens against the released one and against its own reference."""

from pathlib import Path

import numpy as np
import pytest
import torch

from mmtoken.layers.common import old_tiles as tiles
from mmtoken.layers.swat import stem as structured_stem
from mmtoken.layers.swat.stem import StructuredStem
from mmtoken.runtime.reference import reference_path

GOLDEN = Path(__file__).parents[2] / 'data' / 'swat_ops_golden.npz'
PARTS = dict(c1='conv1', nm='norm1', c2='conv2', no='norm2', pos='plane_pos')
SWIN = dict(embed_dims=24, patch_size=4, side=2, kernel_size=2, hidden_dims=12, norm=True)
VIT = dict(embed_dims=32, patch_size=8, side=4, kernel_size=4, hidden_dims=12, position=True)
# As for DeiT-B/32, the second convolution takes 2 x 2 hidden pixels.
WIDE = dict(embed_dims=32, patch_size=16, side=4, kernel_size=4, hidden_dims=12, position=True)
FORMS = dict(swin=SWIN, vit=VIT, wide=WIDE)


@pytest.fixture(params=FORMS)
def stem(request):
    stem = StructuredStem(**FORMS[request.param]).double().eval()
    for parameter in stem.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return stem


@pytest.mark.parametrize('case, arguments', [('tokswin', SWIN), ('tokvit', VIT)])
def test_equals_the_release(case, arguments):
    golden = {name: torch.from_numpy(array) for name, array in np.load(GOLDEN).items()}
    start = f'{case}.w.'
    state = {}
    for name, weight in golden.items():
        if name.startswith(start):
            part, *kind = name.removeprefix(start).split('.')
            state['.'.join([PARTS[part], *kind])] = weight
    stem = StructuredStem(**arguments).double().eval()
    stem.load_state_dict(state)
    image = golden['tokvit.x']
    with torch.no_grad():
        tokens = stem(image)
        with reference_path():
            reference = stem(image)
    assert tuple(tokens.shape[1:3]) == tuple(golden[f'{case}.hw'])
    for out in (tokens, reference):
        torch.testing.assert_close(out.flatten(1, 2), golden[f'{case}.y'], atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize('size', [(32, 48), (33, 70), (5, 3)])
@pytest.mark.parametrize('tile', [1, 700, 10**6])
def test_fast_path_is_the_reference(stem, size, tile, monkeypatch):
    """In training, gradients too, and in inference with tiles of part of a row and of many."""
    monkeypatch.setattr(tiles, 'TILE_ELEMENTS', tile * 12)
    image = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    inputs = [image, *stem.parameters()]
    with reference_path():
        expected = stem(image)
    assert expected.shape[:3] == (2, *(-(-side // stem.patch_size) for side in size))
    weight = torch.randn_like(expected)
    with torch.no_grad():
        torch.testing.assert_close(stem(image), expected, atol=1e-10, rtol=1e-10)
    tokens = stem(image)
    torch.testing.assert_close(tokens, expected, atol=1e-10, rtol=1e-10)
    grads = torch.autograd.grad((tokens * weight).sum(), inputs)
    wanted = torch.autograd.grad((expected * weight).sum(), inputs)
    for grad, other in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, other, atol=1e-9, rtol=1e-9)


def test_tiles_are_rows_or_parts_of_a_row():
    grid = torch.arange(2 * 3 * 5).view(2, 3, 5)
    for length, shapes in ((2, [(1, 2), (1, 2), (1, 1)] * 6), (11, [(2, 5), (1, 5)] * 2)):
        cut = structured_stem._tiles(grid, length)
        assert [tuple(tile.shape) for tile in cut] == shapes
        assert torch.equal(torch.cat([tile.flatten() for tile in cut]), grid.flatten())


@pytest.mark.parametrize('name', ['vit', 'wide'])
def test_position_has_the_period_of_a_token(name):
    """So an image that is moved by whole patches gives moved tokens."""
    stem = StructuredStem(**FORMS[name]).eval()
    p = stem.patch_size
    torch.nn.init.normal_(stem.plane_pos)
    image = torch.randn(1, 3, 6 * p, 6 * p)
    tokens = stem(image)
    moved = stem(image[:, :, p:, 2 * p :])
    # The first row and column see padding in place of pixels.
    torch.testing.assert_close(moved[:, 1:, 1:], tokens[:, 2:, 3:])
    assert not torch.allclose(stem(image.roll(p // 2, 3))[:, :, 2:], tokens[:, :, 2:], atol=0.1)


def test_channels_are_planes_in_row_major_order():
    """A token's channel (plane, row, column) depends on the cell's pixels alone."""
    stem = StructuredStem(**SWIN).eval()
    stem.norm2 = torch.nn.Identity()
    image = torch.randn(1, 3, 8, 8)
    changed = image.clone()
    changed[:, :, 6:8, 4:6] += 1  # row 1, column 0 of token (1, 1)
    difference = (stem(changed) - stem(image)).abs()[0]
    assert difference[1, 1].view(6, 2, 2).gt(1e-4).any(0).tolist() == [
        [False, False],
        [True, False],
    ]
    difference[1, 1] = 0
    assert difference.max() < 1e-6


def test_half_precision():
    stem = StructuredStem(**VIT).eval()
    image = torch.randn(1, 3, 40, 40)
    with torch.no_grad():
        full = stem(image)
        with torch.autocast('cpu', dtype=torch.bfloat16):
            half = stem(image)
    assert half.dtype == image.dtype
    assert (half - full).abs().mean() < 0.02 * full.abs().mean()
