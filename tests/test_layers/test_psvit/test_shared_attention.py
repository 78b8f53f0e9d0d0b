import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from mmtoken.layers.common.attention import join_heads, split_heads
from mmtoken.layers.psvit import shared_attention as module
from mmtoken.layers.psvit.shared_attention import (
    SharedMap,
    SharedQK,
    keeps_map,
    kept_memory,
    shared_attention,
    shared_attention_reference,
)
from mmtoken.runtime.reference import reference_path

GOLDEN = Path(__file__).resolve().parent.parent / 'data' / 'psvit_inferred_golden.npz'
CPU = torch.device('cpu')
MODES = ['auto', 'map', 'query_key']


def draw(batch=2, heads=3, length=37, dims=8, **kwargs):
    """Queries, keys and values of the owner, values of a follower, as a projection lays them."""
    x = torch.randn(batch, length, 4, heads, dims, **kwargs)
    return [t.transpose(1, 2) for t in x.unbind(2)]


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles that end within the rows and within the heads."""
    monkeypatch.setattr(module, 'TILE_ROWS', 10)
    monkeypatch.setattr(module, 'TILE_ELEMENTS', 2 * 10 * 37)


@pytest.mark.parametrize('sharing', MODES)
def test_golden(sharing):
    """Two layers on one map, in double precision."""
    golden = {k: torch.from_numpy(v) for k, v in np.load(GOLDEN).items()}
    x, heads = golden['x'], golden['A'].shape[1]
    q, k, v = (split_heads(x @ golden[name], heads) for name in ('wq', 'wk', 'wv1'))
    attended, shared = shared_attention(q, k, v, sharing)
    y1 = x + join_heads(attended) @ golden['wo1']
    y2 = y1 + join_heads(shared.attend(split_heads(y1 @ golden['wv2'], heads))) @ golden['wo2']
    if sharing == 'map':
        torch.testing.assert_close(shared.weights, golden['A'], atol=1e-12, rtol=0)
    torch.testing.assert_close(y1, golden['y1'], atol=1e-12, rtol=0)
    torch.testing.assert_close(y2, golden['y2'], atol=1e-12, rtol=0)


@pytest.mark.parametrize('overwrite', [False, True])
@pytest.mark.parametrize('sharing', MODES)
@pytest.mark.parametrize('length', [1, 37])
def test_all_ways_agree(sharing, overwrite, length, small_tiles):
    *owner, follower = draw(length=length)
    expected, shared = shared_attention_reference(*owner)
    with torch.no_grad():
        out, kept = shared_attention(*owner, sharing, overwrite)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(kept.attend(follower), shared.attend(follower), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('sharing', MODES)
def test_gradients_agree(sharing):
    inputs = draw()
    grads = []
    for function in (shared_attention_reference, lambda *t: shared_attention(*t, sharing)):
        leaves = [t.clone().requires_grad_() for t in inputs]
        out, shared = function(*leaves[:3])
        loss = out.square().sum() + shared.attend(leaves[3]).square().sum()
        grads.append(torch.autograd.grad(loss, leaves))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize('sharing', MODES)
def test_the_reference_path_writes_the_map(sharing):
    *owner, _ = draw()
    with reference_path():
        assert isinstance(shared_attention(*owner, sharing)[1], SharedMap)


def test_auto_keeps_small_maps_on_a_cpu():
    assert keeps_map('auto', module.KEEP_MAP_TOKENS, CPU, training=False)
    assert not keeps_map('auto', module.KEEP_MAP_TOKENS + 1, CPU, training=False)
    assert not keeps_map('auto', module.KEEP_MAP_TOKENS, CPU, training=True)
    assert not keeps_map('auto', 10, torch.device('cuda'), training=False)
    assert keeps_map('map', 10**6, torch.device('cuda'), training=True)
    *owner, _ = draw(length=module.KEEP_MAP_TOKENS_IN_TRAINING + 1, heads=1)
    assert isinstance(shared_attention(*owner)[1], SharedQK)
    with torch.no_grad():
        assert isinstance(shared_attention(*owner)[1], SharedMap)


def test_only_what_may_be_overwritten_is():
    owner, other = draw()[:3], draw()[:3]
    with torch.no_grad():
        maps = [shared_attention(*owner, 'map', overwrite)[1].weights for overwrite in (0, 1)]
        shared_attention(*other, 'map')
        torch.testing.assert_close(maps[0], maps[1], atol=0, rtol=0)
        new = shared_attention(*other, 'map', overwrite=True)[1].weights
    assert torch.equal(new, maps[1]) and not torch.equal(new, maps[0])


def test_threads_have_their_own_memory():
    pointers = [kept_memory((4, 5), torch.float32).data_ptr()]
    thread = threading.Thread(
        target=lambda: pointers.append(kept_memory((4, 5), torch.float32).data_ptr())
    )
    thread.start()
    thread.join()
    assert pointers[0] == kept_memory((20,), torch.float32).data_ptr() != pointers[1]


def test_large_memory_is_not_kept(monkeypatch):
    monkeypatch.setattr(module, 'KEPT_BUFFER_BYTES', 100)
    monkeypatch.setattr(module, '_kept', threading.local())
    kept_memory((30,), torch.float32)
    assert module._kept.buffer is None
    kept_memory((25,), torch.float32)
    assert module._kept.buffer.numel() == 25


def test_memory_of_inference_mode_serves_outside():
    *owner, _ = draw()
    for context in (torch.inference_mode, torch.no_grad):
        with context():
            shared_attention(*owner, 'map', overwrite=True)
