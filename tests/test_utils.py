import pytest
from mmdet.models import MaskRCNN
from mmengine.registry import DefaultScope

from mmtoken.analysis.twin import our_class
from mmtoken.registry import MODELS
from mmtoken.utils import register_all_modules


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setattr(MODELS, '_module_dict', dict(MODELS.module_dict))
    register_all_modules()


def test_whole_models_of_the_libraries_alone(registered):
    assert {'MaskRCNN', 'EncoderDecoder', 'ImageClassifier'} <= MODELS.module_dict.keys()
    assert not {'ResNet', 'FPN', 'UPerHead'} & MODELS.module_dict.keys()
    register_all_modules()  # once more changes nothing


def test_built_in_the_scope_of_their_library(registered, monkeypatch):
    scopes = []
    monkeypatch.setattr(
        MaskRCNN, '__init__', lambda self: scopes.append(DefaultScope.get_current_instance())
    )
    MODELS.get('MaskRCNN')()
    assert scopes[0].scope_name == 'mmdet'


def test_they_are_not_taken_for_ours(registered):
    assert our_class(dict(type=MaskRCNN)) is None
    assert our_class(dict(type='mmdet.MaskRCNN')) is None
