import pytest
from mmengine.config import Config

from mmtoken.analysis.configs import default_shape, load_config


@pytest.mark.parametrize(
    'text, message',
    [
        ("default_scope = 'mmpose'", "'mmpose'; it must be one of mmdet"),
        ("default_scope = 'mmseg'", 'needs a `model`'),
    ],
)
def test_configs_of_other_kinds(text, message, tmp_path):
    (tmp_path / 'config.py').write_text(text)
    with pytest.raises(ValueError, match=message):
        load_config(tmp_path / 'config.py')


def pipeline(*transforms):
    return dict(test_dataloader=dict(dataset=dict(dataset=dict(pipeline=list(transforms)))))


@pytest.mark.parametrize(
    'settings, shape',
    [
        (dict(default_scope='mmdet'), (800, 1280)),
        (dict(default_scope='mmseg'), (512, 512)),
        (dict(default_scope='mmpretrain'), (224, 224)),
        (pipeline(dict(type='Resize', scale=(1333, 800), keep_ratio=True)), (800, 1280)),
        (pipeline(dict(type='Resize', scale=(220, 160), keep_ratio=True)), (160, 224)),
        (pipeline(dict(type='Resize', scale=(640, 480))), (480, 640)),
        (
            pipeline(dict(type='ResizeEdge', scale=256), dict(type='CenterCrop', crop_size=192)),
            (192, 192),
        ),
        (dict(model=dict(data_preprocessor=dict(size=(96, 128)))), (96, 128)),
    ],
)
def test_default_shape(settings, shape):
    assert default_shape(Config(dict(dict(default_scope='mmdet', model={}), **settings))) == shape
