from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config

from mmtoken.analysis.recording import check_channels, image_pipeline, to_picture, val_dataloader


def preprocessor(channels, rgb=True, scale=50.0):
    values = torch.full((channels, 1, 1), scale)
    return SimpleNamespace(mean=values, std=values, _enable_normalize=True, _channel_conversion=rgb)


def test_colours():
    image = torch.tensor([0.0, 1.0, 2.0]).view(3, 1, 1).expand(3, 2, 4)
    assert to_picture(image, preprocessor(3))[1, 3].tolist() == [50, 100, 150]
    assert to_picture(image, preprocessor(3, rgb=False))[1, 3].tolist() == [150, 100, 50]


def test_one_channel_is_grey():
    picture = to_picture(torch.tensor([[[0.0, 1.0, 2.0]]]), preprocessor(1, rgb=False))
    assert picture.shape == (1, 3, 3)
    assert picture[0].tolist() == [[50] * 3, [100] * 3, [150] * 3]


@pytest.mark.parametrize('channels', [2, 4, 6])
def test_of_other_channels_the_mean_is_grey(channels):
    image = torch.stack([torch.tensor([[0.0, 1.0, 2.0]]) + i for i in range(channels)])
    picture = to_picture(image, preprocessor(channels))
    assert picture[0].tolist() == [[0] * 3, [128] * 3, [255] * 3]


@pytest.mark.parametrize('scale', [4000.0, 0.4])
def test_other_values_than_those_of_8_bits_are_stretched(scale):
    image = torch.tensor([[[-1.0, 0.0, 1.0]]]).expand(3, -1, -1)
    picture = to_picture(image, preprocessor(3, scale=scale))
    assert picture[0, :, 0].tolist() == [0, 128, 255]
    assert to_picture(torch.zeros(3, 2, 2), preprocessor(3, scale=scale)).max() == 0


@pytest.mark.parametrize(
    'taken, mean, loaded, words',
    [
        (1, [0.0], 3, 'images of 3 channels, data_preprocessor.mean has 1 values, and .* is 1'),
        (3, [0.0], 1, 'images of 1 channels'),
        (4, [0.0] * 3, 4, 'images of 4 channels, data_preprocessor.mean has 3 values, and .* is 4'),
        (1, None, 3, 'images of 3 channels, and backbone.in_channels is 1'),
    ],
)
def test_channels_that_disagree(taken, mean, loaded, words):
    model = dict(backbone=dict(in_channels=taken))
    if mean is not None:
        model['data_preprocessor'] = dict(mean=mean)
    batch = dict(inputs=[torch.zeros(loaded, 4, 4)])
    with pytest.raises(ValueError, match=words):
        check_channels(Config(dict(model=model)), batch)
    check_channels(Config(dict(model=dict(backbone={}))), dict(inputs=[torch.zeros(3, 4, 4)]))


def test_no_data():
    cfg = Config(dict(default_scope='mmseg'))
    with pytest.raises(ValueError, match='test_dataloader.dataset.pipeline'):
        image_pipeline(cfg)
    with pytest.raises(ValueError, match='no val_dataloader'):
        val_dataloader(cfg)
