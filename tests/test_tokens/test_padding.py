import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtoken.tokens.padding import padding_regions, valid_size
from mmtoken.tokens.regions import lay_regions


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
    regions = lay_regions(grid, (1,), region)
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
    regions = lay_regions((8, 4), (1, 2, 4), 4)
    padding = padding_regions(torch.tensor([[valid, 128]]), 32, regions)
    assert (~padding).sum() == expected
