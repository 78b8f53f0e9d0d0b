"""Modules that read checkpoints when MMEngine initializes or loads them."""

import pytest
import torch
from torch import nn

from mmtoken.checkpoints.module import CheckpointedBackbone, CheckpointedModule


def make(base, **kwargs):
    class Net(base):
        def __init__(self, init_cfg=None):
            super().__init__(init_cfg)
            self.layer = nn.Linear(2, 2)
            self.fresh = 0

        def init_fresh(self):
            super().init_fresh()
            self.fresh += 1

    return Net(**kwargs)


def layer(value):
    return {'layer.weight': torch.full((2, 2), value), 'layer.bias': torch.full((2,), value)}


@pytest.mark.parametrize('base', [CheckpointedModule, CheckpointedBackbone])
def test_checkpoints_come_after_all_other_initialization(base, save):
    constant = dict(type='Constant', val=3.0, layer='Linear')
    pretrained = [
        dict(type='Pretrained', checkpoint=save(layer(value), f'{value}.pth'))
        for value in (1.0, 2.0)
    ]
    net = make(base, init_cfg=[*pretrained, constant])
    net.init_weights()
    assert (net.layer.weight == 2).all() and net.fresh == 1
    with torch.no_grad():
        net.layer.weight.zero_()
    net.init_weights()  # only once, as MMEngine's
    assert (net.layer.weight == 0).all() and net.fresh == 1


def test_initialization_may_be_repeated_after_an_error(save):
    file = save(dict(other=torch.zeros(1)))
    net = make(CheckpointedModule, init_cfg=dict(type='Pretrained', checkpoint=file))
    with pytest.raises(ValueError, match='file.pth'):
        net.init_weights()
    save(layer(1.0))
    net.init_weights()
    assert (net.layer.weight == 1).all()


def test_backbones_convert_whatever_is_loaded():
    net = make(CheckpointedBackbone)
    model = nn.ModuleDict(dict(backbone=net))
    model.load_state_dict({f'backbone.{name}': tensor for name, tensor in layer(1.0).items()})
    assert (net.layer.weight == 1).all()
    with pytest.raises((ValueError, RuntimeError), match='conv1'):
        model.load_state_dict({'backbone.conv1.weight': torch.zeros(1)})
