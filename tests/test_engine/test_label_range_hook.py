"""Labels that are no class are named; for whole trainings see test_end_to_end."""

from types import SimpleNamespace

import pytest
import torch
from mmengine.structures import BaseDataElement, PixelData
from torch import nn

from mmtoken.engine import LabelRangeHook

RUNNER = SimpleNamespace(model=nn.Module())
RUNNER.model.num_classes = 5


def batch(label):
    labels = torch.zeros(1, 4, 4, dtype=torch.long)
    labels[0, 1, 2] = label
    sample = BaseDataElement(
        gt_sem_seg=PixelData(data=labels), metainfo=dict(seg_map_path='labels/7.png')
    )
    return dict(data_samples=[sample])


@pytest.mark.parametrize('label', [0, 4, 255])
def test_classes_and_ignored_pixels(label):
    LabelRangeHook().before_train_iter(RUNNER, 0, batch(label))


@pytest.mark.parametrize('label', [5, 254, -1])
def test_other_labels(label):
    with pytest.raises(ValueError, match=rf'labels/7.png has the labels \[{label}\].* 5 classes'):
        LabelRangeHook().before_train_iter(RUNNER, 0, batch(label))


def test_models_without_classes():
    with pytest.raises(TypeError, match='needs a segmentor of mmseg, which has num_classes, got'):
        LabelRangeHook().before_train(SimpleNamespace(model=nn.Linear(1, 1)))
