"""The example for Hugging Face's transformers, where their version 5 is installed."""

import re
from pathlib import Path

import pytest
import torch

import mmtoken

transformers = pytest.importorskip('transformers', minversion='5', reason='transformers 5')
PAGE = Path(__file__).resolve().parent.parent / 'docs' / 'get_started.md'


def test_example_saves_and_loads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r'^```python\n(.*?)^```$', PAGE.read_text(), re.S | re.M)
    (block,) = [block for block in blocks if 'from transformers' in block]
    *before, loading = block.rstrip().splitlines()
    names = dict(torch=torch, mmtoken=mmtoken)
    exec('\n'.join(before), names)
    saved = names['segmenter']
    exec(loading, names)
    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        expected = saved(images).logits
        assert expected.shape == (1, 3, 64, 96)
        torch.testing.assert_close(names['segmenter'](images).logits, expected)
        maps = saved.backbone(images).feature_maps
    assert [tuple(x.shape[1:]) for x in maps] == [
        (96, 16, 24), (192, 8, 12), (384, 4, 6), (768, 2, 3),
    ]  # fmt: skip
