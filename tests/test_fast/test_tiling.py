import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mmtoken.fast import optimize_for_cpu
from mmtoken.fast.tiling import (
    TILE_ELEMENTS,
    TILED,
    chunked_apply,
    tiled,
    tokens_per_tile,
    use_tiling,
)
from mmtoken.runtime.reference import reference_path


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    channels=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    length=st.integers(1, 40),
)
def test_chunks_make_the_whole(shape, channels, length):
    x, y = (torch.randn(*shape, c) for c in channels)
    calls = []

    def function(a, b):
        calls.append(a.shape[:-1].numel())
        return torch.cat([a * 2, b], dim=-1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('mmtoken.fast.tiling.TILE_ELEMENTS', length * max(channels))
        out = chunked_apply(function, x, y)
    assert torch.equal(out, torch.cat([x * 2, y], dim=-1))
    assert max(calls) <= length and sum(calls) == x.shape[:-1].numel()


def test_tokens_per_tile():
    assert tokens_per_tile(96) == 2000 and tokens_per_tile(384) == 500
    assert tokens_per_tile(10 * TILE_ELEMENTS) == 1


def test_in_cpu_inference_alone():
    layer, x = nn.Linear(2, 2).eval(), torch.ones(1, 2)
    with torch.no_grad():
        assert use_tiling(layer, x)
        assert not use_tiling(layer, x.to('meta'))
        assert not use_tiling(layer.train(), x)
        with reference_path():
            assert not use_tiling(layer.eval(), x)
        hook = layer.register_forward_hook(lambda *args: None)
        assert not use_tiling(layer, x)
        hook.remove()
        assert use_tiling(layer, x)
        traced = torch.jit.trace(lambda t: t * float(use_tiling(layer, t)), x)
        # Neither returns t itself: torch 2.1 does not compile what has no operation
        compiled = torch.compile(
            lambda t: t + 1 if use_tiling(layer, t) else t + 2, backend='eager', fullgraph=True
        )
        assert not traced(x).any() and torch.equal(compiled(x), x + 2)
    assert not use_tiling(layer, x)


class Layer(nn.Linear):
    pass


def test_classes_are_exchanged_and_taken_back():
    @tiled
    class TiledLayer(Layer):
        pass

    try:
        model = nn.Sequential(Layer(2, 2), nn.Linear(2, 2), nn.Sequential(Layer(2, 2)))
        names = list(model.state_dict())
        assert optimize_for_cpu(model) is model
        kinds = [type(m) for m in (model[0], model[1], model[2][0])]
        assert kinds == [TiledLayer, nn.Linear, TiledLayer]
        assert list(model.state_dict()) == names
        optimize_for_cpu(model, enabled=False)
        assert type(model[0]) is Layer is type(model[2][0])
    finally:
        del TILED[Layer]
