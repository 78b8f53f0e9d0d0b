import copy
import weakref

import pytest
import torch
from helpers import TORCH_2_1
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtoken.layers.common.padding import (
    padding_regions,
    set_image_sizes,
    sizes_on_map,
    valid_size,
)
from mmtoken.layers.common.regions import make_region_layout


def padded(sizes, height=40, width=56):
    images = torch.zeros(len(sizes), 3, height, width)
    for image, (h, w) in zip(images, sizes, strict=True):
        image[:, :h, :w] = torch.randn(3, h, w)
    return images


def test_size_is_found_behind_any_padding():
    sizes = [(40, 56), (33, 56), (40, 1), (1, 17), (8, 48)]
    assert valid_size(padded(sizes)).tolist() == [list(size) for size in sizes]


def test_one_channel_of_one_pixel_is_enough():
    images = torch.zeros(2, 3, 9, 8)
    images[0, 2, 4, 1] = -1e-30
    images[1, 0, 0, 6] = images[1, 1, 7, 0] = float('inf')
    assert valid_size(images).tolist() == [[5, 2], [8, 7]]


def test_zeros_inside_are_no_padding():
    images = padded([(30, 40)])
    images[:, :, :20] = 0
    images[:, :, :, :39] = 0
    images[:, :, 25:28] = 0
    images[:, 0] = 0
    assert valid_size(images).tolist() == [[30, 40]]


def test_black_images_count_as_a_whole():
    images = padded([(40, 56), (10, 10), (5, 5)])
    images[1:2] = 0
    assert valid_size(images).tolist() == [[40, 56], [40, 56], [5, 5]]
    assert valid_size(torch.zeros(1, 3, 1, 1)).tolist() == [[1, 1]]


def test_half_precision_and_other_strides():
    images = padded([(12, 30), (40, 7)]).half().contiguous(memory_format=torch.channels_last)
    assert valid_size(images).tolist() == [[12, 30], [40, 7]]


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    stride=st.sampled_from([1, 4, 16]),
    region=st.integers(1, 5),
    data=st.data(),
)
def test_padding_regions_have_no_pixel_of_the_image(size, stride, region, data):
    valid = [(data.draw(st.integers(1, size[0])), data.draw(st.integers(1, size[1])))]
    valid.append(size)
    grid = tuple(-(-side // stride) for side in size)
    regions = make_region_layout(grid, (1,), region)
    padding = padding_regions(torch.tensor(valid), stride, regions)
    assert padding.shape == (2, *regions.shape) and padding.dtype == torch.bool
    side = stride * region
    for (height, width), image in zip(valid, padding.tolist(), strict=True):
        for row, line in enumerate(image):
            for column, is_padding in enumerate(line):
                assert is_padding == (row * side >= height or column * side >= width)
    assert not padding[1].any()


@pytest.mark.parametrize('valid, expected', [(128, 1), (129, 2), (127, 1), (256, 2)])
def test_regions_at_the_edge_count(valid, expected):
    regions = make_region_layout((8, 4), (1, 2, 4), 4)
    padding = padding_regions(torch.tensor([[valid, 128]]), 32, regions)
    assert (~padding).sum() == expected


def test_whole_numbers_and_nan():
    assert valid_size(padded([(12, 30)]).mul(9).to(torch.int32) | 1).tolist() == [[40, 56]]
    images = torch.zeros(2, 3, 40, 56, dtype=torch.uint8)
    images[:, :, :12, :30] = 114
    assert valid_size(images).tolist() == [[12, 30]] * 2
    images = padded([(12, 30)])
    images[:, :, 20, 33] = float('nan')  # not zero, so no padding
    assert valid_size(images).tolist() == [[21, 34]]


@pytest.mark.parametrize('colour', [0.0, 1e-6, 114.0, float('nan')])
def test_what_is_noted_counts_and_not_the_colour(colour):
    images = padded([(30, 56), (40, 20)])
    images[images == 0] = colour
    images[0, :, 10:] = 0  # an image that ends in black
    set_image_sizes(images, [(30, 56), (40, 20)])
    assert valid_size(images).tolist() == [[30, 56], [40, 20]]
    set_image_sizes(images, torch.tensor([(3, 4), (5, 6)], dtype=torch.int32))
    assert valid_size(images).tolist() == [[3, 4], [5, 6]]


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('shape', [(3, 3), (3, 1), (1, 3), (1, 1)])
def test_windows_of_a_batch(shape, layout):
    images = torch.ones(*shape, 40, 56).contiguous(memory_format=layout)
    sizes = [(40, 50), (20, 56), (33, 7)][: shape[0]]
    set_image_sizes(images, sizes)
    with torch.no_grad():
        assert valid_size(images[:, :, 8:32, 4:20]).tolist() == [
            [min(max(h - 8, 1), 24), min(max(w - 4, 1), 16)] for h, w in sizes
        ]
    for window in (images[:, :, 30:, 40:][:, :, 5:], images[:, :1, 35:, 40:]):
        shown = [[min(max(h - 35, 1), 5), min(max(w - 40, 1), 16)] for h, w in sizes]
        assert valid_size(window).tolist() == shown
    last = images[-1:]
    assert valid_size(last).tolist() == [list(sizes[-1])]


def test_all_but_windows_are_looked_at():
    images = torch.ones(2, 3, 40, 40)
    images[:, :, 30:] = 0
    set_image_sizes(images, [(10, 10), (20, 20)])
    for other in (
        images.flip(3), images.clone(), images + 0, images.transpose(2, 3).transpose(2, 3).clone(),
        images[:, [2, 1, 0]], torch.cat([images, images]), images.double(),
    ):  # fmt: skip
        assert valid_size(other).tolist() == [[30, 40]] * len(other)
    assert valid_size(images[:, :, ::2]).tolist() == [[15, 40]] * 2
    assert valid_size(images.transpose(2, 3)).tolist() == [[40, 30]] * 2
    with torch.inference_mode():  # views do not know what they are of
        batch = torch.ones(1, 3, 8, 8)
        set_image_sizes(batch, [(4, 4)])
        assert valid_size(batch).tolist() == [[4, 4]]
        assert valid_size(batch[:, :, :6]).tolist() == [[6, 8]]


def test_copies_of_a_batch_keep_its_sizes():
    images = torch.ones(1, 3, 8, 8)
    set_image_sizes(images, [(4, 4)])
    assert valid_size(copy.deepcopy(images)).tolist() == [[4, 4]]


def test_sizes_on_a_map():
    """A place counts if any of its pixels shows the image."""
    images, map_ = torch.ones(2, 3, 32, 48), torch.ones(2, 5, 4, 6)
    assert sizes_on_map(images, map_) is None
    set_image_sizes(images, [(16, 48), (17, 1)])
    assert sizes_on_map(images, map_).tolist() == [[2, 6], [3, 1]]


def test_sizes_end_with_the_batch():
    images = torch.ones(1, 3, 8, 8)
    sizes = torch.tensor([[4, 4]])
    set_image_sizes(images, sizes)
    kept = weakref.ref(sizes)
    del images, sizes
    assert kept() is None


@pytest.mark.parametrize(
    'sizes, message',
    [
        ([(8, 8)], 'must be 2 pairs of integers'),
        ([8, 8], 'must be 2 pairs of integers'),
        ([(8, 8, 3)] * 2, 'must be 2 pairs of integers'),
        ([(8.0, 7.5)] * 2, 'must be 2 pairs of integers'),
        ([(8, 8), (8, 13)], r'8 x 12 pixels .* got \[\[8, 8\], \[8, 13\]\]'),
        ([(8, 8), (0, 12)], r'8 x 12 pixels .* got \[\[8, 8\], \[0, 12\]\]'),
    ],
)
def test_sizes_that_cannot_be(sizes, message):
    with pytest.raises(ValueError, match=message):
        set_image_sizes(torch.ones(2, 3, 8, 12), sizes)


@pytest.mark.skipif(TORCH_2_1, reason='torch 2.1 cannot trace attributes of tensors')
def test_compiled():
    def size(x):
        return valid_size(x) * 2

    compiled = torch.compile(size, backend='eager', fullgraph=True)
    images = padded([(12, 30)])
    assert compiled(images).tolist() == [[24, 60]]
    set_image_sizes(images, [(13, 31)])
    assert compiled(images).tolist() == [[26, 62]]
