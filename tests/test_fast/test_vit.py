from functools import partial

import pytest
import torch

from mmtoken.fast import optimize_for_cpu, tiling
from mmtoken.fast.vit import TiledViTBlock
from mmtoken.layers.common.attention import varlen_attention
from mmtoken.layers.common.vit import ViTBlock
from mmtoken.runtime.reference import reference_path

LENGTHS = [5, 1, 9, 4]


@pytest.mark.parametrize('length', [1, 3, 100])
def test_tiles_of_any_size(length, monkeypatch):
    block = ViTBlock(24, 3, 36, drop_path=0.5, layer_scale=0.1).eval()
    x = torch.randn(sum(LENGTHS), 24)
    args = (x, partial(varlen_attention, lengths=LENGTHS), LENGTHS)
    expected = block(*args)
    monkeypatch.setattr(tiling, 'TILE_ELEMENTS', 24 * length)
    optimize_for_cpu(block)
    assert type(block) is TiledViTBlock
    with torch.no_grad():
        torch.testing.assert_close(block(*args), expected, atol=1e-5, rtol=1e-5)
        with reference_path():
            torch.testing.assert_close(block(*args), expected, atol=1e-5, rtol=1e-5)
    optimize_for_cpu(block, enabled=False)
    assert type(block) is ViTBlock
