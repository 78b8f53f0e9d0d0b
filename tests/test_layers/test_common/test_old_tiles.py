import pytest
import torch
from torch import nn

from mmtoken.layers.common.old_tiles import (
    TILE_ELEMENTS,
    chunked_apply,
    tokens_per_tile,
    use_tiling,
)
from mmtoken.runtime.reference import reference_path


@pytest.mark.parametrize('tokens', [1, 7, 5000])
def test_tokenwise_functions(tokens):
    x, y = torch.randn(2, tokens, 96), torch.randn(2, tokens, 8)

    def function(x, y):
        calls.append(len(x))
        return x.sin() + y.sum(-1, keepdim=True)

    for context, training, tiles in (
        (torch.no_grad(), False, -(-2 * tokens // 2000)),
        (torch.no_grad(), True, 1),
        (torch.enable_grad(), False, 1),
    ):
        calls = []
        with context:
            out = chunked_apply(function, x, y, training=training, layers=())
        torch.testing.assert_close(out, x.sin() + y.sum(-1, keepdim=True), atol=0, rtol=0)
        assert len(calls) == tiles


def test_only_inference_works_in_tiles():
    x = torch.zeros(1)
    assert not use_tiling(x, training=False)
    with torch.no_grad():
        assert use_tiling(x, training=False)
        assert not use_tiling(x, training=True)
        assert not use_tiling(x.to('meta'), training=False)
        with reference_path():
            assert not use_tiling(x, training=False)


def test_tiles_are_for_plain_layers():
    layer, x = nn.Linear(96, 8), torch.randn(5000, 96)
    with torch.no_grad():
        assert use_tiling(x, False, layer)
        calls = []
        layer.register_forward_hook(lambda module, args, out: calls.append(len(out)))
        assert not use_tiling(x, False, layer)
        chunked_apply(layer, x, training=False, layers=(layer,))
    assert calls == [5000]


def test_tiles_are_as_large_for_any_width():
    assert tokens_per_tile(96) == 2000 and tokens_per_tile(384) == 500
    assert tokens_per_tile(2 * TILE_ELEMENTS) == 1
