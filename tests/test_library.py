import re

import pytest
from mmengine.config import Config

from mmtoken.library import library_of, read_config


def config(**settings):
    return Config(settings)


@pytest.fixture
def model_class():
    from mmseg.models import EncoderDecoder

    return EncoderDecoder


def test_the_scope_tells(model_class):
    assert library_of(config(default_scope='mmdet', model=dict(type=model_class))) == 'mmdet'


def test_without_a_scope_the_model_does(model_class):
    class Mine(model_class):
        pass

    path = 'mmseg.models.EncoderDecoder'  # what MMEngine writes in place of a class
    for kind in (model_class, Mine, path, 'mmseg.EncoderDecoder'):
        assert library_of(config(default_scope=None, model=dict(type=kind))) == 'mmseg'
    assert library_of(config(model=dict(type='mmpretrain.ImageClassifier'))) == 'mmpretrain'


@pytest.mark.parametrize(
    'settings',
    [{}, dict(model={}), dict(model=dict(type='Mine')), dict(model=dict(type='torch.nn.Linear'))],
)
def test_neither_tells(settings):
    with pytest.raises(ValueError, match='the config: default_scope is None; it must be one of'):
        library_of(config(**settings))


def test_reading(tmp_path):
    (tmp_path / 'a.json').write_text('{"_base_": ["b.yaml"], "x": 1}')
    (tmp_path / 'b.yaml').write_text('y: [2, 3]')
    assert read_config(tmp_path / 'a.json').to_dict() == dict(x=1, y=[2, 3])
    for path, words in ((tmp_path, 'this is a folder'), (tmp_path / 'c.py', 'no config file')):
        with pytest.raises(FileNotFoundError, match=words):
            read_config(path)
    (tmp_path / 'd.py').write_text('x = y\n')
    with pytest.raises(ValueError, match=re.escape("cannot be read: NameError: name 'y'")):
        read_config(tmp_path / 'd.py')


def test_configs_of_libraries():
    assert read_config('mmtoken::shapes/fpn_pvt-nano_1xb16-500i_shapes-128x128.py').model
    assert read_config('mmdet::retinanet/retinanet_r50_fpn_1x_coco.py').model.type == 'RetinaNet'
    with pytest.raises(
        FileNotFoundError, match='mmdet is installed in .* without its configs/x.py'
    ):
        read_config('mmdet::x.py')
    for name in ('nothing', 'no.thing', ''):
        with pytest.raises(
            FileNotFoundError, match=f'configs/x.py of {name}, which is not installed'
        ):
            read_config(f'{name}::x.py')


@pytest.mark.parametrize(
    'bases',
    ["'{}'", "['{}']", "['{}', './mine.py']", "['./mine.py', '{}']", "['./list.py', './mine.py']"],
)
def test_our_configs_are_found_in_any_place(bases, tmp_path):
    ours = 'mmtoken::shapes/fpn_vit-nano_1xb16-1500i_shapes-128x128.py'
    (tmp_path / 'mine.py').write_text('mine = 1\n')
    (tmp_path / 'list.py').write_text(f"_base_ = ['{ours}']\n")
    (tmp_path / 'config.py').write_text(f'_base_ = {bases.format(ours)}\n')
    assert library_of(read_config(tmp_path / 'config.py')) == 'mmseg'
