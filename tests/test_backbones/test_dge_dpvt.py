import pytest
import torch
from families import DPVT, PVT
from torch import nn

from mmtoken.backbones import DGEDPVT


def test_parameters_of_the_twin():
    with torch.device('meta'):
        model = DGEDPVT(
            granularities=(1,), out_type='avg_featmap', out_indices=(3,), pretrain_img_size=256
        )
        head = nn.Linear(512, 1000)
    total = sum(p.numel() for m in (model, head) for p in m.parameters())
    assert round(total / 1e6, 3) == 17.616


def test_arguments_reach_the_blocks():
    model = DGEDPVT(DPVT, num_points=2, region_size=8, train_mode='dense', with_cp=True)
    for stage in model.layers:
        for block in stage.blocks:
            assert block.attn.num_points == 2 and block.region_size == 8
            assert block.train_mode == 'dense' and stage.with_cp


def test_bad_arguments():
    with pytest.raises(TypeError, match='DGEDPVT takes no cls_token'):
        DGEDPVT(DPVT, cls_token=True)
    with pytest.raises(ValueError, match="'medium'; known are"):
        DGEDPVT('medium')
    with pytest.raises(ValueError, match='has the keys'):
        DGEDPVT(PVT)
