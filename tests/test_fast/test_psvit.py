import pytest
import torch

from mmtoken.backbones import PSViT
from mmtoken.fast import optimize_for_cpu, tiling
from mmtoken.fast.psvit import TiledSharingStage
from mmtoken.layers.psvit.sharing import SharingStage
from mmtoken.runtime.reference import reference_path


@pytest.mark.parametrize('window_size', [None, 3])
@pytest.mark.parametrize('length', [1, 7, 1000])
def test_tiled_stage_is_the_stage(window_size, length, monkeypatch):
    stage = SharingStage(24, 3, (3, 1), 36, window_size=window_size, drop_path=[0.5] * 4).eval()
    x = torch.randn(2, 7, 8, 24)
    expected = stage(x)
    monkeypatch.setattr(tiling, 'TILE_ELEMENTS', 24 * length)
    optimize_for_cpu(stage)
    assert type(stage) is TiledSharingStage
    with torch.no_grad():
        torch.testing.assert_close(stage(x), expected, atol=1e-5, rtol=1e-5)
        with reference_path():
            torch.testing.assert_close(stage(x), expected, atol=1e-5, rtol=1e-5)
    optimize_for_cpu(stage, enabled=False)
    assert type(stage) is SharingStage


def test_stages_behind_a_pooling_are_tiled_too(monkeypatch):
    """Pooling is no part of what is run window by window."""
    arch = dict(stages=[(24, 2, (2,)), (36, 3, (2, 1))])
    model = PSViT(arch, window_sizes=(4, 4), out_indices=(0, 1)).eval()
    runs, run = [], SharingStage.run
    monkeypatch.setattr(SharingStage, 'run', lambda *args: runs.append(args[1]) or run(*args))
    monkeypatch.setattr(tiling, 'TILE_ELEMENTS', 1)
    with torch.no_grad():
        model(torch.randn(1, 3, 128, 128))  # 16 and 4 windows
    assert [tuple(x.shape) for x in runs] == [(1, 16, 24)] * 16 + [(1, 16, 36)] * 4
