"""MMEngine's counter of operations, which the libraries' ``get_flops.py`` use, on our networks."""

import re
import runpy
import sys
from pathlib import Path

import mmseg
import pytest
import torch
from benchmarking.targets import build_target
from mmengine.analysis import FlopAnalyzer, get_model_complexity_info

import mmtoken
from mmtoken.analysis import count_macs, dense_twin
from mmtoken.analysis.configs import load_config
from mmtoken.registry import MODELS
from mmtoken.runtime.reference import reference_path

CONFIGS = Path(__file__).resolve().parent.parent.parent / 'configs' / 'shapes'
SWIN = dict(embed_dims=16, depths=(2, 1, 6, 1), num_heads=(1, 2, 2, 4))
VIT = dict(embed_dims=32, num_layers=4, num_heads=2, feedforward_channels=48)
DPVT = dict(
    embed_dims=(16, 32, 40), depths=(1, 2, 1), num_heads=(1, 2, 5), mlp_ratios=(4, 2, 2),
)  # fmt: skip
PYRAMID = dict(out_indices=(0, 1, 2), drop_path_rate=0.5)
STATIC = [
    dict(type='mmtoken.STViTRSwin', arch=SWIN, drop_path_rate=0.5),
    dict(type='mmtoken.STViTRSwin', arch=SWIN, form='classification', use_global=True),
    dict(type='mmtoken.STViTRSwin', arch=SWIN, pad_mask='exact', with_cp=True),
    dict(type='mmtoken.STViTDeiT', arch=VIT, base_layers=1, drop_path_rate=0.5),
    dict(type='mmtoken.PSViT', arch=dict(stages=[(16, 1, (2,)), (32, 2, (2, 1))]),
         window_sizes=(4, None), out_indices=(0, 1), drop_path_rate=0.5),
    dict(type='mmtoken.PSViT', arch=dict(stages=[(16, 1, (2,)), (32, 2, (2, 1))]),
         window_sizes=(4, None), out_indices=(0, 1), with_cp=True),
    dict(type='mmtoken.SWATSwin', arch=dict(SWIN, embed_dims=32, depths=(1, 1, 2, 1)),
         drop_path_rate=0.5),
    dict(type='mmtoken.SWATDeiT', arch=dict(VIT, patch_size=16, mlp_kernel=3), plane_size=4,
         drop_path_rate=0.5),
]  # fmt: skip
CHOOSING = [
    dict(type='mmtoken.DGEPVT', arch=dict(DPVT, sr_ratios=(8, 4, 1)), **PYRAMID),
    dict(type='mmtoken.DGEPVT', arch=dict(DPVT, sr_ratios=(8, 4, 1)), cls_token=True, **PYRAMID),
    dict(type='mmtoken.DGEDPVT', arch=DPVT, with_cp=True, **PYRAMID),
    dict(type='mmtoken.DGEDeiT', arch=VIT, drop_path_rate=0.5),
    dict(type='mmtoken.MSViT', arch=VIT, drop_path_rate=0.5),
    dict(type='mmtoken.MSViT', arch=VIT, cls_token=False, window_size=4, global_blocks=(1,)),
]
needs_stock_tool = pytest.mark.skipif(
    mmseg.__version__ == '1.2.2', reason='get_flops.py of mmseg 1.2.2 fails with any model'
)
PRODUCTS = ('linear', 'matmul', 'conv', 'addmm', 'bmm', 'einsum')  # the rest is norms and the like


def images(batch, height, width):
    return torch.randn(batch, 3, height, width)


def products(model, x):
    """Multiply-accumulates that MMEngine counts, of what we count too."""
    counter = FlopAnalyzer(model, (x,))
    counter.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    return sum(n for name, n in counter.by_operator().items() if name in PRODUCTS)


def ours(model, x):
    model.eval()
    with reference_path():
        return count_macs(model, x)


@pytest.mark.parametrize('cfg', STATIC + [dense_twin(cfg) for cfg in STATIC + CHOOSING])
def test_counts_are_equal(cfg):
    model, x = MODELS.build(cfg), images(1, 75, 101)
    expected = ours(model, x)
    assert products(model.train(), x) == expected


def test_the_rest_is_norms():
    model, x = MODELS.build(STATIC[3]).eval(), images(1, 64, 96)
    counted = get_model_complexity_info(model, None, inputs=x, show_table=False, show_arch=False)
    norms = FlopAnalyzer(model, (x,)).by_operator()['layer_norm']
    assert counted['flops'] == ours(model, x) + norms


@pytest.mark.parametrize('cfg', CHOOSING)
def test_networks_that_choose_refuse(cfg):
    model = MODELS.build(cfg).train()
    with pytest.raises(RuntimeError, match=r'flops.py CONFIG --(query|coarse)-ratio'):
        products(model, images(1, 64, 96))


@pytest.mark.parametrize('cfg', CHOOSING)
def test_choices_that_do_not_depend_on_the_image_are_counted(cfg):
    model, x = MODELS.build(cfg).eval(), images(2, 64, 96)
    counts = []
    for count in (ours, products):
        with mmtoken.routing_override(**{model.ratio_name: 0.5}):
            counts.append(count(model, x))
    assert counts[0] == counts[1] < products(MODELS.build(dense_twin(cfg)), x)


@pytest.mark.parametrize('cfg', STATIC + CHOOSING, ids=lambda cfg: cfg['type'])
def test_a_count_leaves_no_trace(cfg):
    """With a size that no other test has, so that plans are made in the trace."""
    model, x = MODELS.build(cfg).eval(), images(1, 80, 112)
    if cfg in STATIC:
        products(model, x)
    else:
        with pytest.raises(RuntimeError, match='torch.jit.trace'):
            products(model, x)
    assert not torch.jit.is_tracing()
    with torch.no_grad():
        fast = model(x)
    with reference_path():
        reference = model(x)  # with gradients
    for a, b in zip(fast, reference, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('cfg', STATIC, ids=lambda cfg: cfg['type'])
def test_a_traced_network_computes_the_same(cfg):
    model = MODELS.build(cfg).eval()
    with torch.no_grad():
        traced = torch.jit.trace(model, images(1, 75, 101), check_trace=False)
        other = images(1, 75, 101)
        for a, b in zip(traced(other), model(other), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def run_stock_tool(config, monkeypatch):
    """mmseg's ``get_flops.py`` on one of our configs."""
    tool = Path(mmseg.__file__).parent / '.mim' / 'tools' / 'analysis_tools' / 'get_flops.py'
    arguments = [str(tool), str(CONFIGS / config), '--shape', '128', '128']
    monkeypatch.setattr(sys, 'argv', arguments)
    runpy.run_path(str(tool), run_name='__main__')


@needs_stock_tool
def test_stock_tool_counts(monkeypatch, capsys):
    config = 'upernet_stvit-r-swin-nano_1xb16-750i_shapes-128x128.py'
    run_stock_tool(config, monkeypatch)
    flops = float(re.search(r'Flops: (\S+)G', capsys.readouterr().out)[1])
    network = build_target(load_config(CONFIGS / config), 'model').build()
    assert flops == pytest.approx(ours(network, images(1, 128, 128)) / 1e9, rel=0.02)


@needs_stock_tool
def test_stock_tool_is_refused(monkeypatch):
    with pytest.raises(RuntimeError, match='flops.py CONFIG --query-ratio'):
        run_stock_tool('fpn_dge-pvt-nano_1xb16-300i_shapes-128x128.py', monkeypatch)
