"""The command lines of tools/analysis: figures that agree with each other, help, errors."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli import routing_line, routing_words

ROOT = Path(__file__).resolve().parent.parent.parent
SHAPES = ROOT / 'configs' / 'shapes'
DETECTOR = SHAPES / 'mask-rcnn_stvit-r-swin-nano_fpn_1xb8-7e_shapes.py'
(ROUTED,) = SHAPES.glob('fpn_dge-pvt-nano_1xb16-*.py')


@pytest.fixture
def run_json(run, tmp_path):
    """Run a tool; its results and its output."""

    def call(tool, *args):
        file = tmp_path / 'out' / 'results.json'
        result = run(tool, *args, '--json', file)
        assert result.returncode == 0, result.stderr
        return json.loads(file.read_text()), result.stdout

    return call


def test_flops(run_json):
    results, out = run_json('flops', DETECTOR)
    assert results['shape'] == [160, 224] and '160 x 224' in out
    for side in (results['sparse'], results['dense']):
        assert side['macs'] == sum(side['kinds'].values())
        assert side['macs'] == sum(sum(kinds.values()) for kinds in side['stages'].values())
        assert side['executed_extra'] == side['executed'] - side['macs']
        assert f'{side["parameters"] / 1e6:.2f} M params' in out
    assert results['mac_ratio'] == results['dense']['macs'] / results['sparse']['macs'] > 1
    assert list(results['sparse']['stages'])[0] == 'patch_embed'
    assert max(map(len, out.splitlines())) <= 80


def test_flops_at_a_query_ratio(run_json):
    results, out = run_json('flops', ROUTED, '--query-ratio', 0.4)
    sparse, dense = results['sparse'], results['dense']
    assert results['query_ratio'] == 0.4 and 'coarse_ratio' not in results
    assert sparse['ratios']['query_ratio'] == pytest.approx(0.4, abs=0.02) and not dense['ratios']
    assert sparse['macs'] == sum(sum(kinds.values()) for kinds in sparse['stages'].values())
    assert sparse['macs'] == sparse['executed']
    assert results['mac_ratio'] > 1.7
    assert f'Random token layouts: query ratio {sparse["ratios"]["query_ratio"]:.3f}' in out


def test_flops_with_memory(mixed, run_json, monkeypatch):
    peaks = []

    def peak(target, setting):
        peaks.append((target.name, setting.train))
        return 100.0 * (1 + (target.name == 'dense twin') + 2 * setting.train)

    monkeypatch.setattr('benchmarking.memory.peak_on_cpu', peak)
    results, out = run_json('flops', mixed, '--shape', 64, 64, '--ratio', 0.5, '--memory')
    assert 'Peak memory in MiB: forward pass 100 / 200, training step 300 / 400.' in out
    assert results['peak_mb']['sparse'] == {'forward pass': 100.0, 'training step': 300.0}
    assert results['environment']['torch'] == torch.__version__
    assert peaks[:2] == [('MSViT', False), ('MSViT', True)]


def test_tools_agree_where_tokens_depend_on_the_image(tmp_path, run_json, monkeypatch):
    monkeypatch.setattr('benchmarking.measure.peak_mb', lambda *args: None)  # in processes
    path = tmp_path / 'merge.py'
    path.write_text("""
default_scope = 'mmseg'
arch = dict(embed_dims=16, num_layers=3, num_heads=2, feedforward_channels=16)
backbone = dict(type='mmtoken.MergeViT', arch=arch, img_size=32, merge_blocks=(1,))
model = dict(backbone=backbone)
""")
    args = (path, '--shape', 128, 128)
    counted = run_json('flops', *args)[0]['sparse']['macs']
    assert run_json('benchmark', *args, '--rounds', 1)[0]['macs_sparse'] == counted


def test_ratios_in_words():
    measured = dict(query_ratio=0.399, coarse_ratio=0.2)
    drawn = routing_line(dict(query_ratio=0.4), measured)
    assert drawn == 'Random token layouts: query ratio 0.399, coarse ratio 0.200.'
    assert routing_line({}, measured).startswith('Token layouts of the untrained routers: query')
    assert routing_line({}, {}) is None
    assert routing_words(dict(query_ratio=0.436, coarse_ratio=None)) == ['query ratio 0.436']
    assert routing_words(dict(coarse_ratio=[0.5])) == ['coarse ratio 0.5']
    assert routing_words(dict(coarse_ratio=[0.25, 1.0, 0.0])) == ['coarse ratio .25/1/0']


def test_benchmark_profiles_the_parts_of_a_detector(run_json, monkeypatch):
    monkeypatch.setattr('benchmarking.measure.peak_mb', lambda *args: None)  # in processes
    args = (DETECTOR, '--shape', 64, 64, '--rounds', 1, '--part', 'model', '--profile')
    results, out = run_json('benchmark', *args)
    for parts in (results['parts_ms'][network] for network in ('sparse', 'dense', 'peer')):
        assert set(parts) == {'backbone', 'neck', 'rpn_head', 'roi_head', 'rest'}
        assert all(ms > 0 for ms in parts.values())
    assert 'kind of work' in out and 'part of the model' in out and 'roi_head' in out


@pytest.fixture
def mixed(tmp_path):
    """Config of a small MSViT."""
    path = tmp_path / 'msvit.py'
    path.write_text("""
default_scope = 'mmseg'
arch = dict(embed_dims=16, num_layers=1, num_heads=2, feedforward_channels=16)
model = dict(backbone=dict(type='mmtoken.MSViT', arch=arch))
""")
    return path


def test_coarse_ratios_of_several_images(mixed, run, run_json, tmp_path, monkeypatch):
    monkeypatch.setattr('benchmarking.measure.peak_mb', lambda *args: None)  # in processes
    args = (mixed, '--shape', 64, 64, '--ratio', 0.25, 1)
    results, out = run_json('flops', *args)
    assert results['coarse_ratio'] == [0.25, 1.0] and 'query_ratio' not in results
    assert results['sparse']['ratios']['coarse_ratio'] == 0.625
    assert 'mean of 2 images of 64 x 64, coarse ratio .25/1' in ' '.join(out.split())
    assert 'Random token layouts: query ratio 0.531, coarse ratio 0.625.' in out
    result = run('benchmark', *args, '--batch-size', 3)
    assert result.returncode == 1 and 'must be a multiple of 2, got 3' in result.stderr
    counted = results['sparse']['macs']
    results, out = run_json('benchmark', *args, '--batch-size', 2, '--rounds', 1)
    assert results['macs_sparse'] == counted
    assert results['coarse_ratio'] == [0.25, 1.0] and results['coarse_ratio_measured'] == 0.625
    assert results['peer'] == 'mmpretrain.VisionTransformer'
    assert 'coarse ratio .25/1' in ' '.join(out.split())
    result = run('summary', tmp_path / 'out' / 'results.json')
    assert result.returncode == 0 and '.25/1' in result.stdout


def test_benchmark(run_json):
    args = (ROUTED, '--rounds', 2, '--shape', 64, 64, '--query-ratio', 0.5, '--against', DETECTOR)
    results, out = run_json('benchmark', *args)
    assert results['mac_ratio'] == results['macs_dense'] / results['macs_sparse']
    assert results['realised'] == pytest.approx(results['speedup'] / results['mac_ratio'])
    executed = results['executed']
    assert results['executed_ratio'] == executed['dense'] / executed['sparse']
    times = results['round_ms']
    assert list(times) == ['sparse', 'dense', 'peer', DETECTOR.stem]
    assert all(len(rounds) == 2 and min(rounds) > 0 for rounds in times.values())
    for over, key in (('dense', 'speedup'), ('peer', 'speedup_vs_peer')):
        ratio = sum(a / b for a, b in zip(times[over], times['sparse'], strict=True)) / 2
        assert results[key] == pytest.approx(ratio)  # the median of two
    assert results['sparse_ms'] == pytest.approx(sum(times['sparse']) / 2)
    assert results['dense_ms'] > 0 and results['peer_ms'] > 0
    assert results['peer'] == 'mmdet.PyramidVisionTransformer'
    assert results['query_ratio'] == 0.5 and results['query_ratio_measured'] < 0.6
    assert set(results['against']) == {DETECTOR.stem}
    assert results['peak_mb_sparse'] > 0 and results['peak_mb_dense'] > 0
    assert (results['threads'], results['dtype'], results['shape']) == (1, 'float32', [64, 64])
    environment = results['environment']
    assert environment['torch'] == torch.__version__ and 'mmdet' in environment
    assert re.fullmatch(r'\d+\.\d+\.\d+', environment['mmtoken'])
    assert 'realised' in out and 'dense twin' in out and 'PyramidVisionTransformer' in out
    assert 'Random token layouts' in out
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize(
    'tool, words',
    [
        ('flops', ['examples:', '--shape H W', 'default: backbone', 'reference path']),
        ('benchmark', ['examples:', '--against', 'default: float32', 'realised', '--ratio']),
        ('compare', ['examples:', '--pair CFG TWIN', 'seed by seed', 'output.log', '--jobs']),
        ('token_maps', ['examples:', '[CKPT] IMAGE', 'queries per token', '--per-block']),
        ('token_stats', ['examples:', '--background', 'at least half of its pixels']),
    ],
)
def test_help_teaches(tool, words, run):
    result = run(tool, '--help')
    assert result.returncode == 0
    assert all(word in result.stdout for word in words)


def test_errors_are_one_line(run, tmp_path):
    config = tmp_path / 'config.py'
    result = run('flops', config)
    assert result.returncode == 1 and result.stderr == f'flops: no config file {config}\n'
    config.write_text("default_scope = 'mmdet'\nmodel = dict(backbone=dict(type='ResNet'))\n")
    result = run('benchmark', config)
    assert result.returncode == 1 and result.stderr.count('\n') == 1
    assert "only 'ResNet'; known are" in result.stderr and 'mmtoken.STViTRSwin' in result.stderr


def test_ratios_that_make_no_sense(run):
    result = run('flops', ROUTED, '--shape', 64, 64, '--coarse-ratio', 0.5)
    assert result.returncode == 1 and result.stderr.strip().count('\n') == 0
    assert 'DGEPVT takes a query_ratio, got a coarse_ratio' in result.stderr
    result = run('benchmark', ROUTED, '--query-ratio', 0.5, '--coarse-ratio', 0.5)
    assert result.returncode == 2 and 'give one ratio' in result.stderr


def test_shapes_are_positive(run):
    result = run('flops', DETECTOR, '--shape', 0, 64)
    assert result.returncode == 2 and 'must be 1 or more, got 0' in result.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_no_gpu(run):
    result = run('benchmark', DETECTOR, '--device', 'cuda')
    assert result.returncode == 1
    assert result.stderr == (
        'benchmark: --device cuda: torch sees no CUDA device here; use --device cpu\n'
    )


def test_summary_is_of_medians_over_runs(run, tmp_path):
    setting = dict(
        config='mask-rcnn_nano_fpn.py', part='backbone', shape=[64, 96], batch_size=2,
        device='cpu', dtype='float32', threads=1, train=False, compile=False,
    )  # fmt: skip
    figures = dict(
        dense_ms=300.0, speedup=1.5, mac_ratio=1.4, executed_ratio=1.6, speedup_vs_peer=None,
        peak_mb_sparse=10.0, peak_mb_dense=20.0,
    )  # fmt: skip
    for i, sparse_ms in enumerate((100.0, 900.0, 200.0)):
        (tmp_path / f'{i}.json').write_text(
            json.dumps(setting | figures | dict(sparse_ms=sparse_ms))
        )
    for i, other in (
        (3, dict(train=True)),
        (4, dict(query_ratio=0.43, query_ratio_measured=0.429)),
    ):
        (tmp_path / f'{i}.json').write_text(
            json.dumps(setting | figures | dict(sparse_ms=7.0) | other)
        )
    result = run('summary', *sorted(tmp_path.glob('*.json')))
    assert result.returncode == 0, result.stderr
    rows = [line.split() for line in result.stdout.splitlines() if line.startswith(' nano')]
    assert [row[-1] for row in rows] == ['3', '1', '1']
    assert '200' in rows[0] and '1.50' in rows[0]


def test_summary_refuses_other_files(run, tmp_path):
    (tmp_path / 'a.json').write_text('{"config": 1}')
    result = run('summary', tmp_path / 'a.json')
    assert result.returncode == 1 and 'no result of benchmark.py' in result.stderr


def test_as_a_command():
    command = [sys.executable, ROOT / 'tools' / 'analysis' / 'flops.py', 'none.py']
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1 and result.stderr == 'flops: no config file none.py\n'
