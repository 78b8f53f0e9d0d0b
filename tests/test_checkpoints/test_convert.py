"""Foreign names become ours, or are refused."""

import pytest
import torch

from mmtoken.checkpoints import convert, detect_source
from mmtoken.checkpoints.convert import take_prefix

VIT = {f'blocks.0.attn.qkv.{kind}': torch.zeros(1) for kind in ('weight', 'bias')}
VIT |= {'patch_embed.proj.weight': torch.zeros(1)}


@pytest.mark.parametrize('start', ['', 'module.', 'backbone.', 'module.backbone.'])
def test_family_is_recognized_behind_the_usual_prefixes(start):
    state = {start + name: tensor for name, tensor in VIT.items()} | {'head.bias': torch.zeros(1)}
    assert detect_source(state) == 'vit'
    renamed, report = convert(state, 'vit')
    assert renamed.keys() == VIT.keys()
    assert report.dropped == ['head.bias']


def test_prefix_of_the_user():
    state = {f'encoder.{name}': tensor for name, tensor in VIT.items()} | {'decoder.bias': None}
    for prefix in ('encoder', 'encoder.'):
        taken, others = take_prefix(state, prefix)
        assert taken.keys() == VIT.keys() and others == ['decoder.bias']
        assert detect_source(state, prefix) == 'vit'
    assert detect_source(state, 'teacher') is None
    with pytest.raises(ValueError, match=r"prefix 'teacher\.'; names start with decoder, encoder"):
        take_prefix(state, 'teacher')


def test_other_names_are_refused():
    with pytest.raises(ValueError, match=r'not supported; it has blocks\.0\.attn\.lora\.weight'):
        convert({**VIT, 'blocks.0.attn.lora.weight': torch.zeros(1)}, 'vit')


def test_two_names_for_one_tensor():
    names = ('layers.0.ln1.weight', 'layers.0.attn.qkv.weight', 'blocks.0.attn.qkv.weight')
    with pytest.raises(ValueError, match='both become blocks.0.attn.qkv.weight'):
        convert({name: torch.zeros(1) for name in names}, 'vit')
